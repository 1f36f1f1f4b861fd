"""One Kafka and one Pinot for the tests of what is served."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.launcher.kafka import Kafka
from services.launcher.pinot import Pinot
from services.launcher.processes import find
from services.launcher.trial import throwaway_kafka, throwaway_pinot
from services.serving.tables import CREDITS_TOPIC, METRICS_TOPIC
from spark_jobs.config import load_settings
from spark_jobs.java import require_java


@pytest.fixture(scope="session")
def served_kafka() -> Iterator[Kafka]:
    """A broker with the published topics, empty. Tests kill it and bring it up again."""
    topics = (METRICS_TOPIC, CREDITS_TOPIC, "elsewhere")
    jars = load_settings().jar_cache_path
    with throwaway_kafka(jar_cache=jars, java=lambda: require_java().executable, topics=topics, heap="256m") as made:
        yield made


@pytest.fixture(scope="session")
def served_pinot() -> Iterator[Pinot]:
    """A Pinot without tables."""
    with throwaway_pinot(jar_cache=load_settings().jar_cache_path, java=lambda: require_java().executable, heap="768m") as made:
        yield made
        folder = made.folder
    assert not folder.exists() and not any(find(folder, role) for role in Pinot.role_names)
