"""Find gaps: records that a topic lost before a batch read them. Such a batch fails until an operator gives the records up.

A topic loses records by retention, or because somebody deletes it and creates it again, which only its id shows: the offsets begin
at 0 again. A decision is a row of `source_gaps` with the offsets that were missing then. A later loss needs another decision.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from confluent_kafka import IsolationLevel, KafkaException, TopicCollection, TopicPartition
from confluent_kafka import KafkaError as Code
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import OffsetSpec

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import KafkaError, OffsetGapError, UsageError
from spark_jobs.ingest.checkpoint_log import numbers
from spark_jobs.ingest.kafka.config import KafkaCluster
from spark_jobs.ingest.kafka.ranges import OffsetRange, Partition, partition_of, read_batch_offsets
from spark_jobs.lake.acts import Act, act_info, complete_audit_log
from spark_jobs.lake.checkpoint_copy import checkpoints_to_read
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import RAW_TABLES, SOURCE_GAPS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.steps import Step

ANSWER_SECONDS = 10.0
_ENDS = {"earliest": OffsetSpec.earliest(), "latest": OffsetSpec.latest()}  # type: ignore[no-untyped-call]
TOPIC_FILE = "topic.json"  # in the checkpoint
_RUNBOOK = "docs/runbooks/offset-gap.md"


@dataclass(frozen=True)
class TopicState:
    """A topic as its cluster has it: its id and, by partition, the first offset and the one after the last committed record."""

    cluster: str
    topic: str
    topic_id: str
    earliest: dict[int, int]
    latest: dict[int, int]


@dataclass(frozen=True)
class Gap:
    """Missing offsets [first, end) of a partition. ``end`` equals ``first`` if a topic was created again: nobody knows."""

    partition: Partition
    first: int
    end: int

    def __str__(self) -> str:
        if self.first == self.end:
            return f"partition {self.partition.number} from offset {self.first} on"
        return f"partition {self.partition.number} offsets {self.first} to {self.end - 1}"


def read_topic(cluster: KafkaCluster, topic: str, seconds: float = ANSWER_SECONDS) -> TopicState:
    """Read the state of a topic. Raises KafkaError if the cluster does not answer in ``seconds`` or lacks the topic."""
    where = f"cluster {cluster.name} at {cluster.bootstrap_servers}"
    errors: list[str] = []  # of the client: a refused login, a port where nobody listens
    options: dict[str, Any] = {"log_level": "0", "error_cb": lambda error: errors.append(error.str()), **cluster.client_options()}
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
        problem = f": {_cause(admin, errors) or error.args[0].str()}"
        raise KafkaError(f"{where} does not answer{problem}", hint="is the broker up?") from None
    except TimeoutError:
        problem = f" within {seconds:.0f} s{_cause(admin, errors, ': ')}"
        raise KafkaError(f"{where} does not answer{problem}", hint="is the broker up?") from None
    return TopicState(cluster.name, topic, str(described.topic_id), found["earliest"], found["latest"])


def _cause(admin: AdminClient | None, errors: list[str], prefix: str = "") -> str:
    """Return the client's last error, ignoring that all brokers are down, which says nothing."""
    if admin is not None:
        admin.poll(0.1)  # which calls error_cb
    causes = [line for line in errors if "brokers are down" not in line]
    return f"{prefix}{causes[-1]}" if causes else ""


def topic_label(settings: Settings, stream: str, state: TopicState) -> str:
    """Return how tables and checkpoints name a topic: its name; the second topic of that name is ``name~2``, and so on.

    Raises OffsetGapError if another topic of that name was read before and no operator accepted this one.
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
    """Return the ids of the topics of a name that were read, or that an operator accepted, in that order."""
    known = known_topic_id(checkpoint_of(settings, stream, cluster, topic, topic))
    ids = [] if known is None else [known]
    for row in sorted(_decisions(settings, stream, cluster, topic), key=lambda row: row["accepted_at"]):
        if not ids:  # the checkpoint is lost; the decision still shows how many topics came before
            ids = [""] * (int(row["source_topic"].rpartition("~")[2]) - 1) if "~" in row["source_topic"] else []
        if row["topic_id"] not in ids:
            ids.append(row["topic_id"])
    return ids


def checkpoint_of(settings: Settings, stream: str, cluster: str, topic: str, label: str) -> Path:
    """Return where to read the checkpoint of a topic's query. ``stream`` begins the query's name: events or raw_events."""
    return checkpoints_to_read(settings) / query_name(stream, cluster, topic, label)


def query_name(stream: str, cluster: str, topic: str, label: str) -> str:
    """Return the name of the query that reads a topic, and of its checkpoint. ``stream`` begins it: events or raw_events."""
    return f"{stream}-{cluster}{label.removeprefix(topic)}"


def keep_topic(checkpoint: Path, state: TopicState) -> None:
    """Write the id of the topic into the checkpoint. Raises OffsetGapError if the checkpoint has another topic's."""
    known = known_topic_id(checkpoint)
    if known is None:
        disk.write_file(checkpoint / TOPIC_FILE, json.dumps({"topic_id": state.topic_id}).encode())
    elif known != state.topic_id:
        raise OffsetGapError(
            f"topic {state.topic} of cluster {state.cluster} was deleted and made anew while it was read", hint=_RUNBOOK
        )


def readable_ranges(
    settings: Settings, stream: str, wanted: Sequence[OffsetRange], state: TopicState
) -> tuple[list[OffsetRange], int]:
    """Return the part of ``wanted`` that the topic still has, and the number of missing offsets that an operator gave up.

    Raises OffsetGapError if offsets are missing that nobody gave up.
    """
    ranges: list[OffsetRange] = []
    gaps: list[Gap] = []
    for one in wanted:
        gone, kept = _cut(one, state)
        gaps += gone
        if kept.start < kept.end:
            ranges.append(kept)
    decisions = _decisions(settings, stream, state.cluster, state.topic) if gaps else []
    left = [gap for gap in gaps if not any(_covers(row, gap, state) for row in decisions)]
    if left:
        raise OffsetGapError(
            f"topic {state.topic} of cluster {state.cluster} does not have any more what was to be read next: "
            f"{'; '.join(map(str, left))}",
            hint=f"{_RUNBOOK}; to go on behind them: adtally accept-gap {stream} {state.cluster} --reason …",
        )
    return sorted(ranges), sum(gap.end - gap.first for gap in gaps)


def _cut(wanted: OffsetRange, state: TopicState) -> tuple[list[Gap], OffsetRange]:
    """Return the parts of a range that the topic lacks, before and after the part that it has, and that part."""
    partition = partition_of(wanted.name)
    assert partition is not None
    start, end = wanted.start, wanted.end
    first = min(max(start, state.earliest.get(partition.number, end)), end)
    last = max(first, min(end, max(state.latest.get(partition.number, end), start)))
    gaps = [Gap(partition, start, first), Gap(partition, last, end)]
    return [gap for gap in gaps if gap.first < gap.end], OffsetRange(wanted.name, first, last)


def _gaps_of(checkpoint: Path, label: str, state: TopicState) -> list[Gap]:
    """Return what is missing for the next batch of the query with this checkpoint, whether given up or not."""
    planned = max(numbers(checkpoint / "offsets"), default=None)
    if planned is None:
        return []
    offsets = read_batch_offsets(checkpoint, planned, state.topic)
    is_done = (checkpoint / "commits" / str(planned)).exists()
    is_new_topic = known_topic_id(checkpoint) not in (None, state.topic_id)
    gaps = []
    for number, end in sorted(offsets.end.items()):
        partition = Partition(state.cluster, label, number)
        start = end if is_done else offsets.start[number]
        if is_new_topic:
            gaps.append(Gap(partition, start, start))
            continue
        if state.earliest.get(number, start) > start:
            gaps.append(Gap(partition, start, state.earliest[number]))
        if not is_done and state.latest.get(number, 0) < end:
            gaps.append(Gap(partition, max(start, state.latest.get(number, 0)), end))
    return gaps


def missing_now(settings: Settings, stream: str, cluster: KafkaCluster) -> tuple[TopicState, str, list[Gap]]:
    """Return the topic, its label from now on, and the gaps of the ingest or the raw copy, whether given up or not.

    Raises KafkaError if the cluster does not answer.
    """
    state = read_topic(cluster, cluster.topic(stream))
    seen = _seen(settings, stream, cluster.name, state.topic)
    nth = seen.index(state.topic_id) if state.topic_id in seen else len(seen)
    current = _label(state.topic, min(nth, max(len(seen) - 1, 0)))
    merged: dict[tuple[int, bool], Gap] = {}
    for query in (stream, f"raw_{stream}"):
        for gap in _gaps_of(checkpoint_of(settings, query, cluster.name, state.topic, current), current, state):
            key = (gap.partition.number, gap.first == gap.end)
            other = merged.get(key, gap)
            merged[key] = Gap(gap.partition, min(other.first, gap.first), max(other.end, gap.end) if not key[1] else other.first)
    return state, _label(state.topic, nth), [merged[key] for key in sorted(merged)]


def accept_gap(settings: Settings, stream: str, cluster: KafkaCluster, *, reason: str, accepted_by: str) -> list[Gap]:
    """Give up all offsets that are missing now; return them. Raises UsageError if none is, or without a reason and a name."""
    if not reason.strip() or not accepted_by.strip():
        raise UsageError("a reason and a name are needed: both are kept", hint="--reason …")
    ensure_tables(settings)
    state, label, gaps = missing_now(settings, stream, cluster)
    if not gaps:
        raise UsageError(
            f"nothing is missing of topic {state.topic} of cluster {cluster.name}", hint="adtally ingest goes on by itself"
        )
    now = datetime.now(UTC)
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
            "accepted_at": now,
        }
        for gap in gaps
    ]
    arguments = {"stream": stream, "cluster": cluster.name, "topic": label, "gaps": [str(gap) for gap in gaps]}
    info = act_info(Act.ACCEPT_GAP, reason=reason.strip(), arguments=arguments, now=now, by=accepted_by.strip())
    Lake(settings).append(SOURCE_GAPS, pa.Table.from_pylist(rows, SOURCE_GAPS.schema), Step.SOURCE_GAPS, info=info)
    complete_audit_log(settings)
    return gaps


def copied_records(settings: Settings, stream: str, gap: Gap) -> int:
    """Count the records of a gap that the raw copy has: `adtally reconcile --repair` can bring these in."""
    lake, raw = Lake(settings), RAW_TABLES[stream]
    snapshot = lake.pin(raw)
    if gap.first == gap.end or raw not in snapshot:
        return 0
    with lake.database() as database:
        found = database.execute(
            f"select count(distinct source_offset) from {snapshot.scan(raw)} where cluster = ? and source_topic = ? "
            "and source_partition = ? and source_offset >= ? and source_offset < ?",
            [*gap.partition, gap.first, gap.end],
        ).fetchone()
    return int(found[0]) if found else 0


def known_topic_id(checkpoint: Path) -> str | None:
    """Return the id of the topic that a checkpoint's offsets belong to; None if no batch was planned yet."""
    try:
        return str(json.loads((checkpoint / TOPIC_FILE).read_bytes())["topic_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _decisions(settings: Settings, stream: str, cluster: str, topic: str) -> list[dict[str, Any]]:
    rows = Lake(settings).pin(SOURCE_GAPS).rows(SOURCE_GAPS).to_pylist()
    place = (stream, cluster, topic)
    return [row for row in rows if (row["stream"], row["cluster"], row["source_topic"].partition("~")[0]) == place]


def _covers(row: dict[str, Any], gap: Gap, state: TopicState) -> bool:
    same = (row["source_partition"], row["topic_id"]) == (gap.partition.number, state.topic_id)
    return same and row["first_offset"] <= gap.first and gap.end <= row["end_offset"]
