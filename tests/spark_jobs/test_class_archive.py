"""The archive of classes: which one is used, and that Java takes its classes from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spark_jobs import session
from spark_jobs.class_archive import class_archive, make_class_archive
from spark_jobs.config import Settings, load_settings
from spark_jobs.jars import read_lock

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A cache of its own, with the jars of the usual one."""
    jars = load_settings().jar_cache_path / read_lock().digest
    (tmp_path / "cache" / "jars").mkdir(parents=True)
    (tmp_path / "cache" / "jars" / jars.name).symlink_to(jars)
    monkeypatch.setenv("ADTALLY_CACHE_DIR", str(tmp_path / "cache"))
    return load_settings(home=tmp_path / "a home")


def _place(settings: Settings) -> Path:
    """Put a file where the archive belongs."""
    from spark_jobs.class_archive import _archive_path

    path = _archive_path(settings)
    path.touch()
    return path


def test_an_archive_of_another_java_or_of_other_jars_is_not_used(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert class_archive(settings) is None
    path = _place(settings)
    assert class_archive(settings) == path
    assert make_class_archive(settings) == path  # it is there
    monkeypatch.setattr("spark_jobs.class_archive.jars_of_spark", list)
    assert class_archive(settings) is None


def test_only_a_session_on_this_machine_uses_it(settings: Settings) -> None:
    path = _place(settings)
    local = session._classes(settings, "-Xa", one_machine=True)
    assert local["spark.driver.extraJavaOptions"] == f"-Xa -XX:SharedArchiveFile={path}"
    assert len(local["spark.driver.extraClassPath"].split(":")) == len(read_lock().jars)
    path.unlink()
    assert session._classes(settings, "-Xa", one_machine=True).keys() == {"spark.driver.extraClassPath"}
    assert session._classes(settings, "-Xa", one_machine=False).keys() == {"spark.jars"}


@pytest.mark.e2e
def test_java_takes_its_classes_from_the_archive(settings: Settings, tmp_path: Path) -> None:
    said: list[str] = []
    made = make_class_archive(settings, said.append)
    assert "archiving the classes" in said[-1] and class_archive(settings) == made
    landed = settings.landing_path / "orders" / "eu" / "1.jsonl"
    landed.parent.mkdir(parents=True)
    landed.write_text("no order\n", "utf-8")
    loaded = tmp_path / "loaded.log"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ADTALLY_HOME": str(settings.home_path),
        "SPARK_SUBMIT_OPTS": f"-Xlog:class+load=info:file={loaded}",
    }
    command = [sys.executable, "-m", "spark_jobs", "ingest", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["rejected"] == 1
    sources = [line.rpartition("source: ")[2] for line in loaded.read_text("utf-8").splitlines()]
    archived = sum(source.startswith("shared objects file") for source in sources)
    assert archived > 0.7 * len(sources) > 5_000
