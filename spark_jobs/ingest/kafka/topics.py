"""Report how far the topics of each cluster are read and copied, and which clusters do not answer within a few seconds."""

from __future__ import annotations

import re
from contextlib import closing, suppress
from dataclasses import dataclass, field

from confluent_kafka import KafkaException, TopicPartition

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError
from spark_jobs.ingest.kafka.config import KafkaCluster, read_kafka
from spark_jobs.ingest.kafka.gaps import TopicState, checkpoint_of, read_topic
from spark_jobs.ingest.kafka.ranges import finished_offsets
from spark_jobs.ingest.kafka.reading import open_consumer
from spark_jobs.lake.checkpoint_copy import checkpoints_to_read
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import SOURCE_GAPS, STREAMS

ASK_SECONDS = 3.0


@dataclass(frozen=True)
class TopicSource:
    """A topic that is ingested. ``topic`` is its label in tables.

    By partition, batches are complete up to the offset ``read_to``, the raw copy up to ``copied_to``, and the committed records
    end at ``ends`` (None: the cluster does not answer; ``problem`` says why). ``gaps`` counts an operator's decisions to give up
    missing records, ``lost_offsets`` the offsets that these covered, as far as is known.
    """

    cluster: str
    stream: str
    topic: str
    read_to: dict[int, int] = field(default_factory=dict)
    copied_to: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] | None = None
    gaps: int = 0
    lost_offsets: int = 0
    problem: str | None = None

    @property
    def lag(self) -> int | None:
        """The number of offsets that are not read yet; some have no record. None: unknown."""
        return None if self.ends is None else _missing(self.read_to, self.ends)

    @property
    def copy_lag(self) -> int | None:
        """The number of offsets that are not copied yet: of the topic, or of what was read if the cluster does not answer."""
        return _missing(self.copied_to, self.read_to if self.ends is None else self.ends)


def _missing(at: dict[int, int], ends: dict[int, int]) -> int:
    return sum(max(0, end - at.get(number, 0)) for number, end in ends.items())


def read_topic_sources(settings: Settings, *, seconds: float = ASK_SECONDS) -> list[TopicSource]:
    """Return the topics of all ingested clusters, in the order of kafka.toml. Raises KafkaConfigurationError if that is wrong."""
    clusters = read_kafka(settings).consumed
    gaps = Lake(settings).pin(SOURCE_GAPS).rows(SOURCE_GAPS).to_pylist() if clusters else []
    found = []
    for cluster in clusters:
        away: str | None = None
        for stream in STREAMS:
            state = None
            try:
                state = read_topic(cluster, cluster.topic(stream), seconds) if away is None else None
            except AdtallyError as error:
                away = str(error)
            decided = [row for row in gaps if (row["stream"], row["cluster"]) == (stream, cluster.name)]
            found.append(_source(settings, stream, cluster, state, decided, away))
            if state is None and "has no topic" in (away or ""):
                away = None  # the other topic may exist
    return found


def _source(
    settings: Settings,
    stream: str,
    cluster: KafkaCluster,
    state: TopicState | None,
    decided: list[dict[str, int]],
    problem: str | None,
) -> TopicSource:
    topic = cluster.topic(stream)
    label = topic + _newest_suffix(settings, stream, cluster.name)
    try:
        read_to, copied_to = (
            finished_offsets(checkpoint_of(settings, query, cluster.name, topic, label), topic)
            for query in (stream, f"raw_{stream}")
        )
    except AdtallyError as error:  # a checkpoint that cannot be read
        read_to, copied_to, problem = {}, {}, problem or str(error)
    lost = sum(row["end_offset"] - row["first_offset"] for row in decided)
    ends = None if state is None else state.latest
    if state is not None:  # offsets before the topic's beginning do not wait
        read_to = {number: max(read_to.get(number, 0), first) for number, first in state.earliest.items()}
        copied_to = {number: max(copied_to.get(number, 0), first) for number, first in state.earliest.items()}
    return TopicSource(cluster.name, stream, label, read_to, copied_to, ends, len(decided), lost, problem)


def _newest_suffix(settings: Settings, stream: str, cluster: str) -> str:
    """Return the suffix of the newest topic of the name: "", or ~2 and so on if the topic was deleted and created again."""
    names = (path.name for path in checkpoints_to_read(settings).glob(f"{stream}-{cluster}~*"))
    numbers = [int(found[1]) for name in names if (found := re.fullmatch(r".*~([0-9]+)", name))]
    return f"~{max(numbers)}" if numbers else ""


def oldest_waiting(settings: Settings, source: TopicSource, *, seconds: float = ASK_SECONDS) -> float | None:
    """Return when the oldest unread record entered its topic (seconds since the epoch); None if none arrives in ``seconds``."""
    if not source.lag or source.ends is None:
        return None
    topic = source.topic.partition("~")[0]
    read_to = {number: source.read_to.get(number, 0) for number in source.ends}
    waiting = [TopicPartition(topic, number, read_to[number]) for number, end in source.ends.items() if end > read_to[number]]
    options = read_kafka(settings).cluster(source.cluster).client_options()
    oldest: list[float] = []
    with closing(open_consumer(options, **{"enable.partition.eof": "false"})) as consumer, suppress(KafkaException):
        for partition in waiting:  # one after the other, because the first record of each is needed
            consumer.assign([partition])
            message = consumer.poll(seconds)
            if message is not None and message.error() is None:
                oldest.append(message.timestamp()[1] / 1000)
    return min(oldest, default=None)
