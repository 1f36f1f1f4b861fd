"""Services for tests: each runs in a new folder on ports of its own, and is deleted at the end with all its data."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from services.launcher.kafka import PARTITIONS, TOPICS, Kafka
from services.launcher.pinot import Pinot
from services.launcher.s3 import S3


@contextmanager
def throwaway_kafka(
    *,
    jar_cache: Path,
    java: Callable[[], Path],
    topics: tuple[str, ...] = TOPICS,
    partitions: int = PARTITIONS,
    heap: str = "512m",
    parent: Path | None = None,
) -> Iterator[Kafka]:
    """Run a Kafka within the context. Two nested ones are two regions.

    It is killed at the end, and by the kernel if this thread ends before. Its folder is made in ``parent``.
    """
    folder = Path(tempfile.mkdtemp(prefix="adtally-kafka-", dir=parent))
    kafka = Kafka(folder, jar_cache=jar_cache, java=java, heap=heap, ends_with_parent=True)
    kafka.topics, kafka.partitions = topics, partitions
    try:
        kafka.up()
        yield kafka
    finally:
        kafka.down()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def throwaway_pinot(*, jar_cache: Path, java: Callable[[], Path], heap: str = "1g", parent: Path | None = None) -> Iterator[Pinot]:
    """Run a Pinot within the context, as `throwaway_kafka` does a Kafka."""
    folder = Path(tempfile.mkdtemp(prefix="adtally-pinot-", dir=parent))
    pinot = Pinot(folder, jar_cache=jar_cache, java=java, heap=heap, ends_with_parent=True)
    try:
        pinot.up()
        yield pinot
    finally:
        pinot.down()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def throwaway_s3(*, parent: Path | None = None) -> Iterator[S3]:
    """Run an object store within the context, as `throwaway_kafka` does a Kafka."""
    folder = Path(tempfile.mkdtemp(prefix="adtally-s3-", dir=parent))
    store = S3(folder, ends_with_parent=True)
    try:
        store.up()
        yield store
    finally:
        store.down()
        shutil.rmtree(folder, ignore_errors=True)
