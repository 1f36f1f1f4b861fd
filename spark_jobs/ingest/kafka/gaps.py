"""Records that are gone before they were read: found before each batch, told by their offsets, gone past only by decision.

A topic loses records when its retention passes, or when it is deleted and made anew; its id tells, for offsets begin at 0 again.
A decision is a row of `source_gaps`: what was missing when it was made. What goes missing later takes another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.dataset as ds
from confluent_kafka import IsolationLevel, KafkaException, TopicCollection, TopicPartition
from confluent_kafka import KafkaError as Code
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import OffsetSpec
from deltalake import DeltaTable

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import KafkaError, OffsetGapError, UsageError
from spark_jobs.ingest.kafka.config import KafkaCluster
from spark_jobs.ingest.kafka.offsets import read_batch_offsets
from spark_jobs.ingest.kafka.ranges import OffsetRange, Partition, partition_of
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.reading import read_newest
from spark_jobs.lake.tables import RAW_TABLES, SOURCE_GAPS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.steps import Step

ANSWER_SECONDS = 10.0
_ENDS = {"earliest": OffsetSpec.earliest(), "latest": OffsetSpec.latest()}  # type: ignore[no-untyped-call]
TOPIC_FILE = "topic.json"  # in the checkpoint
_RUNBOOK = "docs/runbooks/offset-gap.md"


@dataclass(frozen=True)
class TopicState:
    """A topic as its cluster has it: its id, and by partition the first offset and the one behind the last committed record."""

    cluster: str
    topic: str
    topic_id: str
    earliest: dict[int, int]
    latest: dict[int, int]


@dataclass(frozen=True)
class Gap:
    """Offsets [first, end) of a partition that are gone. ``end`` as ``first``: of a topic made anew, nobody knows how many."""

    partition: Partition
    first: int
    end: int

    def __str__(self) -> str:
        if self.first == self.end:
            return f"partition {self.partition.number} from offset {self.first} on"
        return f"partition {self.partition.number} offsets {self.first} to {self.end - 1}"


@dataclass(frozen=True)
class Settled:
    """The ranges of a batch that can be read, and how many offsets before them were given up."""

    ranges: list[OffsetRange]
    lost: int


class KnownTopic(msgspec.Struct, frozen=True):
    """The topic that a checkpoint's offsets are of."""

    topic_id: str


def read_topic(cluster: KafkaCluster, topic: str, seconds: float = ANSWER_SECONDS) -> TopicState:
    """Ask a cluster for a topic. Raises KafkaError where it does not answer in ``seconds`` or has no such topic."""
    where = f"cluster {cluster.name} at {cluster.bootstrap_servers}"
    told: list[str] = []  # why: a refused login, a port where nobody listens
    options: dict[str, Any] = {"log_level": "0", "error_cb": lambda error: told.append(error.str()), **cluster.client_options()}
    admin: AdminClient | None = None
    try:
        admin = AdminClient(options)
        described = admin.describe_topics(TopicCollection([topic]), request_timeout=seconds)[topic].result(timeout=seconds)
        parts = [TopicPartition(topic, one.id) for one in described.partitions]
        found = {}
        for name, spec in _ENDS.items():
            asked = admin.list_offsets(
                dict.fromkeys(parts, spec), isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=seconds
            )
            found[name] = {part.partition: int(future.result(timeout=seconds).offset) for part, future in asked.items()}
    except KafkaException as error:
        if error.args[0].code() == Code.UNKNOWN_TOPIC_OR_PART:
            raise KafkaError(f"{where} has no topic {topic}", hint="make it, or correct kafka.toml") from None
        raise KafkaError(
            f"{where} does not answer: {_cause(admin, told) or error.args[0].str()}", hint="is the broker up?"
        ) from None
    except TimeoutError:
        raise KafkaError(
            f"{where} does not answer within {seconds:.0f} s{_cause(admin, told, ': ')}", hint="is the broker up?"
        ) from None
    return TopicState(cluster.name, topic, str(described.topic_id), found["earliest"], found["latest"])


def _cause(admin: AdminClient | None, told: list[str], before: str = "") -> str:
    """What the client told last but for that all brokers are down, which says nothing."""
    if admin is not None:
        admin.poll(0.1)  # so that it tells
    said = [line for line in told if "brokers are down" not in line]
    return f"{before}{said[-1]}" if said else ""


def topic_label(settings: Settings, stream: str, state: TopicState) -> str:
    """What tables and checkpoints call a topic: its name, and from the second topic of that name on ``name~2`` and so on.

    Raises OffsetGapError where another topic of that name was read before and nobody decided to go on with this one.
    """
    seen = _seen(settings, stream, state.cluster, state.topic)
    if state.topic_id in seen:
        return _label(state.topic, seen.index(state.topic_id))
    if seen:
        raise OffsetGapError(
            f"topic {state.topic} of cluster {state.cluster} was deleted and made anew: what it held and was not read yet is gone",
            hint=f"{_RUNBOOK}; to go on with the new one: adtally accept-gap {stream} {state.cluster} --reason …",
        )
    return state.topic


def _label(topic: str, nth: int) -> str:
    return topic if nth == 0 else f"{topic}~{nth + 1}"


def _seen(settings: Settings, stream: str, cluster: str, topic: str) -> list[str]:
    """Ids of the topics of a name that were read, or that an operator decided to read, in that order."""
    known = held_topic(checkpoint_of(settings, stream, cluster, topic, topic))
    ids = [known.topic_id] if known else []
    for row in sorted(_decisions(settings, stream, cluster, topic), key=lambda row: row["accepted_at"]):
        if not ids:  # the checkpoint is lost; the decision says what it went past
            ids = [""] * (int(row["source_topic"].rpartition("~")[2]) - 1) if "~" in row["source_topic"] else []
        if row["topic_id"] not in ids:
            ids.append(row["topic_id"])
    return ids


def checkpoint_of(settings: Settings, stream: str, cluster: str, topic: str, label: str) -> Path:
    """The checkpoint of the query that reads a topic; ``stream`` as the query's name begins, such as events or raw_events."""
    return settings.checkpoints_path / f"{stream}-{cluster}{label.removeprefix(topic)}"


def keep_topic(checkpoint: Path, state: TopicState) -> None:
    """Keep in the checkpoint which topic its offsets are of. Raises OffsetGapError where it is another one by now."""
    held = held_topic(checkpoint)
    if held is None:
        disk.write_file(checkpoint / TOPIC_FILE, msgspec.json.encode(KnownTopic(state.topic_id)))
    elif held.topic_id != state.topic_id:
        raise OffsetGapError(
            f"topic {state.topic} of cluster {state.cluster} was deleted and made anew while it was read", hint=_RUNBOOK
        )


def settle_ranges(settings: Settings, stream: str, wanted: Sequence[OffsetRange], state: TopicState) -> Settled:
    """The part of ``wanted`` that the topic still has. Raises OffsetGapError where a part is gone that nobody has given up."""
    ranges, gaps = [], []
    for one in wanted:
        partition = partition_of(one.name)
        assert partition is not None
        gone, kept = _cut(partition, one.start, one.end, state)
        gaps += gone
        if kept.start < kept.end:
            ranges.append(kept)
    _refuse_open(settings, stream, state, gaps)
    return Settled(sorted(ranges), sum(gap.end - gap.first for gap in gaps))


def _refuse_open(settings: Settings, stream: str, state: TopicState, gaps: Sequence[Gap]) -> None:
    if not gaps:
        return
    decisions = _decisions(settings, stream, state.cluster, state.topic)
    left = [gap for gap in gaps if not any(_covers(row, gap, state) for row in decisions)]
    if left:
        raise OffsetGapError(
            f"topic {state.topic} of cluster {state.cluster} does not have any more what was to be read next: "
            f"{'; '.join(map(str, left))}",
            hint=f"{_RUNBOOK}; to go on behind them: adtally accept-gap {stream} {state.cluster} --reason …",
        )


def _cut(partition: Partition, start: int, end: int, state: TopicState) -> tuple[list[Gap], OffsetRange]:
    """The parts of [start, end) that the topic does not have, before what it has and behind it; and what it has."""
    earliest = state.earliest.get(partition.number, end)
    latest = state.latest.get(partition.number, end)
    first, last = min(max(start, earliest), end), min(end, max(latest, start))
    gaps = [Gap(partition, start, first)] if first > start else []
    if last < end:
        gaps.append(Gap(partition, max(last, first), end))
    return [gap for gap in gaps if gap.first < gap.end], OffsetRange(partition.name, first, max(first, last))


def gaps_of(checkpoint: Path, label: str, state: TopicState) -> list[Gap]:
    """What is missing for the next batch of the query with this checkpoint, decided or not."""
    planned = max((int(p.name) for p in (checkpoint / "offsets").glob("*") if p.name.isdecimal()), default=None)
    if planned is None:
        return []
    offsets = read_batch_offsets(checkpoint, planned, state.topic)
    is_done = (checkpoint / "commits" / str(planned)).exists()
    held = held_topic(checkpoint)
    gaps = []
    for number, end in sorted(offsets.end.items()):
        partition = Partition(state.cluster, label, number)
        start = end if is_done else offsets.start[number]
        if held is not None and held.topic_id != state.topic_id:
            gaps.append(Gap(partition, start, start))
            continue
        if state.earliest.get(number, start) > start:
            gaps.append(Gap(partition, start, state.earliest[number]))
        if not is_done and state.latest.get(number, 0) < end:
            gaps.append(Gap(partition, max(start, state.latest.get(number, 0)), end))
    return gaps


def missing_now(settings: Settings, stream: str, cluster: KafkaCluster) -> tuple[TopicState, str, list[Gap]]:
    """The topic, its label from now on, and what is missing of it for the ingest or for the raw copy, decided or not.

    Raises KafkaError where the cluster does not answer.
    """
    state = read_topic(cluster, cluster.topic(stream))
    seen = _seen(settings, stream, cluster.name, state.topic)
    nth = seen.index(state.topic_id) if state.topic_id in seen else len(seen)
    current = _label(state.topic, min(nth, max(len(seen) - 1, 0)))
    merged: dict[tuple[int, bool], Gap] = {}
    for query in (stream, f"raw_{stream}"):
        for gap in gaps_of(checkpoint_of(settings, query, cluster.name, state.topic, current), current, state):
            key = (gap.partition.number, gap.first == gap.end)
            held = merged.get(key, gap)
            merged[key] = Gap(gap.partition, min(held.first, gap.first), max(held.end, gap.end) if not key[1] else held.first)
    return state, _label(state.topic, nth), [merged[key] for key in sorted(merged)]


def accept_gap(settings: Settings, stream: str, cluster: KafkaCluster, *, reason: str, accepted_by: str) -> list[Gap]:
    """Decide to go on behind all that is missing now; returns it.

    Raises UsageError where nothing is missing or no reason or name is given.
    """
    if not reason.strip() or not accepted_by.strip():
        raise UsageError("a reason and a name are needed: both are kept", hint="--reason …")
    ensure_tables(settings)
    state, label, gaps = missing_now(settings, stream, cluster)
    if not gaps:
        raise UsageError(
            f"nothing is missing of topic {state.topic} of cluster {cluster.name}", hint="adtally ingest goes on by itself"
        )
    rows = [
        {
            "stream": stream,
            "cluster": cluster.name,
            "source_topic": label,
            "source_partition": gap.partition.number,
            "first_offset": gap.first,
            "end_offset": gap.end,
            "topic_id": state.topic_id,
            "reason": reason.strip(),
            "accepted_by": accepted_by.strip(),
            "accepted_at": datetime.now(UTC),
        }
        for gap in gaps
    ]
    Lake(settings).append(SOURCE_GAPS, pa.Table.from_pylist(rows, SOURCE_GAPS.schema), Step.SOURCE_GAPS)
    return gaps


def copied_records(settings: Settings, stream: str, gap: Gap) -> int:
    """How many records of a gap the raw copy holds, so that `adtally reconcile --repair` can bring them in."""
    uri = settings.table_uri(RAW_TABLES[stream].name)
    if gap.first == gap.end or not DeltaLog(uri).exists():
        return 0
    offset = ds.field("source_offset")
    is_there = (
        (ds.field("cluster") == gap.partition.cluster)
        & (ds.field("source_topic") == gap.partition.topic)
        & (ds.field("source_partition") == gap.partition.number)
        & (offset >= gap.first)
        & (offset < gap.end)
    )
    found = DeltaTable(uri).to_pyarrow_dataset().to_table(columns=["source_offset"], filter=is_there)
    return len(found["source_offset"].unique())


def held_topic(checkpoint: Path) -> KnownTopic | None:
    """The topic that a checkpoint's offsets are of; None: no batch was planned yet."""
    try:
        return msgspec.json.decode((checkpoint / TOPIC_FILE).read_bytes(), type=KnownTopic)
    except (OSError, msgspec.MsgspecError):
        return None


def _decisions(settings: Settings, stream: str, cluster: str, topic: str) -> list[dict[str, Any]]:
    rows = read_newest(settings.table_uri(SOURCE_GAPS.name), SOURCE_GAPS.schema).to_pylist()
    place = (stream, cluster, topic)
    return [row for row in rows if (row["stream"], row["cluster"], row["source_topic"].partition("~")[0]) == place]


def _covers(row: dict[str, Any], gap: Gap, state: TopicState) -> bool:
    same = (row["source_partition"], row["topic_id"]) == (gap.partition.number, state.topic_id)
    return same and row["first_offset"] <= gap.first and gap.end <= row["end_offset"]
