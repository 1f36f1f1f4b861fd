"""One Spark session for a whole test run, and homes to work in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import started_browser
from playwright.sync_api import Browser
from pyspark.sql import SparkSession
from store import place, prefix, store, without_credentials  # noqa: F401

from services.launcher.kafka import Kafka
from services.launcher.trial import throwaway_kafka
from spark_jobs.config import Settings, load_settings
from spark_jobs.java import require_java
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.session import build_session

# Every Spark of a test, also in processes that it starts: what runs for seconds is not worth Java's second compiler.
os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """The tests of a file share what takes long to make, so one process runs them; the others are handed out one by one.

    The longest come first: then no process is left with one of them at the end.
    """
    alone = ("soak", "e2e", "crash")

    def rank(item: pytest.Item) -> int:
        names = [*alone, "services", "homes"]
        return next((at for at, name in enumerate(names) if item.get_closest_marker(name)), len(names))

    for item in items:
        if not any(item.get_closest_marker(name) for name in alone):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))
    items.sort(key=rank)
    yield  # pytest-xdist puts the groups into the names of the tests
    if getattr(config.option, "loadgroup", False):
        assert all("@" in item.nodeid for item in items if item.get_closest_marker("xdist_group")), "groups are not kept together"


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """The session of the run, with the project's own settings."""
    home = tmp_path_factory.mktemp("session")
    session = build_session(load_settings(home=home), "adtally-tests")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    """One real broker of the run, without topics: each test makes its own, under names of its own."""
    jars = load_settings().jar_cache_path
    with throwaway_kafka(jar_cache=jars, java=lambda: require_java().executable, topics=(), heap="256m") as made:
        yield made


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser of the run; each test opens pages of its own (`browser.recorded_page`)."""
    with started_browser() as started:
        yield started


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ADTALLY_") and name != "ADTALLY_CACHE_DIR"]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def empty_lakehouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of the registry, made once and copied by the tests."""
    home = load_settings(home=tmp_path_factory.mktemp("empty"))
    ensure_tables(home)
    return Path(home.lakehouse_uri)


@pytest.fixture
def settings(tmp_path: Path, empty_lakehouse: Path) -> Settings:
    """Settings of a home whose tables are empty, one landing file a batch."""
    made = load_settings(home=tmp_path / "home", max_files_per_batch=1)
    shutil.copytree(empty_lakehouse, made.lakehouse_uri)
    return made
