"""Topics for the benchmarks: the lines of an input as records, and a stream of new events at a steady rate."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from confluent_kafka import KafkaError, Producer

from benchmarks.make_input import World, uuid_text
from benchmarks.measure import BenchmarkError
from services.launcher.kafka import TOPICS, Kafka
from services.launcher.trial import throwaway_kafka
from spark_jobs.config import load_settings
from spark_jobs.java import require_java

_ID = slice(len('{"event_id":"'), len('{"event_id":"') + 36)  # an input's lines begin so


@contextmanager
def broker(work: Path, *, partitions: int, heap: str = "512m", topics: tuple[str, ...] = TOPICS) -> Iterator[Kafka]:
    """A broker of its own with empty topics, gone at the end."""
    work.mkdir(parents=True, exist_ok=True)
    cache = load_settings().jar_cache_path

    def java() -> Path:
        return require_java().executable

    with throwaway_kafka(jar_cache=cache, java=java, topics=topics, partitions=partitions, heap=heap, parent=work) as kafka:
        yield kafka


def kafka_toml(path: Path, clusters: dict[str, str], *, max_offsets: int, publish: str | None = None) -> Path:
    """A kafka.toml with the clusters by name (region) and bootstrap servers; ``publish`` names the one that is published to."""
    parts = [
        f'[[clusters]]\nname = "{name}"\nbootstrap_servers = "{servers}"\nmax_offsets_per_batch = {max_offsets}\n'
        for name, servers in clusters.items()
    ]
    if publish is not None:
        parts.append(f'[publish]\ncluster = "{publish}"\n')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts))
    return path


class Feeder:
    """An idempotent producer that says at the end whether all was taken."""

    def __init__(self, servers: str, **options: Any) -> None:
        self._failed = 0
        settings = {"bootstrap.servers": servers, "enable.idempotence": True, "partitioner": "murmur2_random", "log_level": 0}
        settings |= {"compression.type": "lz4", "linger.ms": 5, "queue.buffering.max.messages": 500_000} | options
        self._producer = Producer({**settings, "delivery.report.only.error": True, "on_delivery": self._delivered})

    def _delivered(self, error: KafkaError | None, _record: object) -> None:
        self._failed += error is not None

    def send(self, topic: str, lines: Iterable[bytes]) -> None:
        """Hand over lines, each under its event id."""
        produce, poll = self._producer.produce, self._producer.poll
        for line in lines:
            while True:
                try:
                    produce(topic, line, line[_ID])
                    break
                except BufferError:
                    poll(0.05)
        poll(0)

    def flush(self) -> None:
        """Wait for the broker. Raises BenchmarkError if it did not take all."""
        left = self._producer.flush(120)
        if left or self._failed:
            raise BenchmarkError(f"the broker did not take {left + self._failed} records")


def feed_files(servers: str, topic: str, files: Iterable[Path]) -> int:
    """The lines of files as records of a topic, in their order; how many."""
    feeder, count = Feeder(servers), 0
    for file in files:
        lines = file.read_bytes().splitlines()
        feeder.send(topic, lines)
        count += len(lines)
    feeder.flush()
    return count


def new_events(world: World, seed: int, first: int, count: int, *, placement: str, region: str) -> list[bytes]:
    """Impressions numbered from ``first`` on, of ads by Zipf's law and each of another user, that happen and are received now."""
    rng = np.random.default_rng([seed, first])
    ids = uuid_text(np.arange(first, first + count, dtype=np.uint64), seed)
    rank = np.searchsorted(world.ad_bounds, rng.random(count))
    ads = world.by_popularity[np.minimum(rank, len(world.by_popularity) - 1)]
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    head = f'"event_type":"impression","event_time":"{now}","received_at":"{now}","region":"{region}"'
    rest = f'"placement":"{placement}","price_micros":1000000,"currency":"EUR","user_agent":"ShopWeb/41"'
    return [
        (
            f'{{"event_id":"{ids[i].decode()}",{head},{world.ad_fields[ads[i]].decode()},"user_id":"u-{first + i:09d}",{rest}}}'
        ).encode()
        for i in range(count)
    ]


class SteadyFeed(threading.Thread):
    """New events at ``rate`` a second, in a group every ``interval`` seconds; ``sent_at`` has the moment before each is sent.

    A group has a placement of its own, ``prefix`` and its number, which is a dimension of the increments.
    """

    def __init__(
        self, servers: str, topic: str, *, rate: float, interval: float, seed: int, region: str, prefix: str = "group"
    ) -> None:
        super().__init__(daemon=True)
        self.size = max(1, round(rate * interval))
        self.sent_at: dict[str, float] = {}
        self.failure: Exception | None = None
        self._interval = self.size / rate
        self._feeder = Feeder(servers, **{"linger.ms": 0})
        self._topic, self._seed, self._region, self._prefix = topic, seed, region, prefix
        self._world = World(seed)
        self._ended = threading.Event()

    @property
    def sent(self) -> int:
        """Events that were handed over."""
        return len(self.sent_at) * self.size

    def run(self) -> None:
        try:
            started, number = time.monotonic(), 0
            while not self._ended.wait(max(0.0, started + number * self._interval - time.monotonic())):
                name = f"{self._prefix}-{number:07d}"
                # numbers above those of any input of the same seed
                first = (1 << 32) + number * self.size
                lines = new_events(self._world, self._seed, first, self.size, placement=name, region=self._region)
                at = time.monotonic()
                self._feeder.send(self._topic, lines)
                self.sent_at[name] = at
                number += 1
            self._feeder.flush()
        except Exception as error:
            self.failure = error

    def stop(self) -> None:
        """End, and raise what went wrong."""
        self._ended.set()
        self.join()
        if self.failure is not None:
            raise self.failure


def wait_for(done: Callable[[], bool], seconds: float, what: str, alive: Callable[[], bool] = lambda: True) -> None:
    """Look ten times a second. Raises BenchmarkError when the time is over or ``alive`` says no."""
    end = time.monotonic() + seconds
    while not done():
        if not alive():
            raise BenchmarkError(f"the program ended before {what}")
        if time.monotonic() > end:
            raise BenchmarkError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.1)
