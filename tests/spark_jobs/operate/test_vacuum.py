"""Vacuum: what nobody needs goes, and whatever a stream, the index, the marts or time travel may read stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import lake
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import BusyError, TableCorruptionError, UsageError
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.lake.locks import REWRITE, SECONDS, Patience, exclusive
from spark_jobs.lake.log import DeltaLog
from spark_jobs.operate.compact import compact
from spark_jobs.operate.vacuum import VacuumReport, vacuum
from spark_jobs.steps import CRASH_VARIABLE
from tests.spark_jobs.operate.test_compact import FILES, everything, home, ingested, traffic

pytestmark = pytest.mark.homes

__all__ = ["home", "ingested"]  # fixtures

ROOT = Path(__file__).resolve().parents[3]
HOUR = timedelta(hours=1)
LONG_AGO_MS = 1_700_000_000_000


def age(settings: Settings) -> None:
    """As if all that was written and removed so far had been long ago."""
    for commit in Path(settings.lakehouse_uri).glob("*/_delta_log/*.json"):
        actions = [json.loads(line) for line in commit.read_text("utf-8").split("\n") if line]
        for action in actions:
            if "remove" in action:
                action["remove"]["deletionTimestamp"] = LONG_AGO_MS
        commit.write_text("".join(json.dumps(action) + "\n" for action in actions), "utf-8")
    for data in Path(settings.lakehouse_uri).rglob("*.parquet"):
        os.utime(data, (LONG_AGO_MS / 1000, LONG_AGO_MS / 1000))


def orphan(settings: Settings, *, old: bool) -> Path:
    """A file of a killed batch: no commit names it."""
    path = Path(settings.table_uri("events")) / "event_date=2025-06-02" / "event_hour=8" / f"part-orphan-{old}.snappy.parquet"
    path.write_bytes(b"PAR1 unfinished")
    if old:
        os.utime(path, (LONG_AGO_MS / 1000, LONG_AGO_MS / 1000))
    return path


def files(settings: Settings) -> set[Path]:
    return set(Path(settings.lakehouse_uri).rglob("*.parquet"))


def readable(settings: Settings, table: str, version: int) -> int | None:
    """Rows of a version, None where a file of it is gone."""
    try:
        return int(DeltaTable(settings.table_uri(table), version=version).to_pyarrow_table().num_rows)
    except FileNotFoundError:
        return None


def of(report: VacuumReport, table: str) -> Any:
    return next(entry for entry in report.tables if entry.table == table)


def published(settings: Settings, **versions: int) -> None:
    """The marts file, as far as it says what it was built from."""
    settings.marts_path.parent.mkdir(parents=True, exist_ok=True)
    with duckdb.connect(str(settings.marts_path)) as marts:
        marts.execute("create or replace table mart_build (mart_group varchar, table_name varchar, delta_version bigint)")
        for name, version in versions.items():
            marts.execute("insert into mart_build values ('hourly', ?, ?)", [name, version])


def test_removed_and_unnamed_files_go_when_they_are_old(home: Settings) -> None:
    uri = home.table_uri("events")
    first = DeltaTable(uri).version()
    compact(home, None)
    last = DeltaTable(uri).version()
    before = everything(home)
    old, new = orphan(home, old=True), orphan(home, old=False)

    report = vacuum(home, dry_run=False)  # nothing but the orphan is a week old
    assert (of(report, "events").paths, of(report, "events").bytes) == ([str(old.relative_to(uri))], 15)
    assert readable(home, "events", first) == readable(home, "events", last) == 4 * 12 * FILES

    shutil.rmtree(home.key_index_path)  # it has not caught up with the compaction, and files stay for it
    old = orphan(home, old=True)
    age(home)
    os.utime(new)
    held = files(home)
    dry = vacuum(home, dry_run=True, retention=HOUR)
    assert files(home) == held
    # of the compacted hours the files of the last batch; those of earlier batches are what it is decided by, should it run again
    assert (of(dry, "events").files, dry.dry_run) == (3 + 1, True)
    version = DeltaTable(uri).version()
    done = vacuum(home, dry_run=False, retention=HOUR)
    assert [(t.table, t.paths, t.bytes) for t in done.tables] == [(t.table, t.paths, t.bytes) for t in dry.tables]
    assert held - files(home) == {Path(uri) / path for path in of(done, "events").paths}
    assert of(done, "events").bytes > 0
    assert new.exists()
    assert not old.exists()
    assert everything(home) == before
    assert DeltaTable(uri).version() == version + 2  # it says so in the log

    again = vacuum(home, dry_run=False, retention=HOUR)
    assert [(entry.table, entry.paths) for entry in again.tables if entry.files] == []
    assert DeltaTable(uri).version() == version + 2
    assert "campaigns" not in {entry.table for entry in done.tables}


def test_time_travel_reaches_as_far_as_the_retention(home: Settings) -> None:
    first = DeltaTable(home.table_uri("events")).version()
    compact(home, None)
    vacuum(home, dry_run=False, retention=HOUR)
    assert readable(home, "events", first) == 4 * 12 * FILES


def test_a_version_that_the_marts_were_built_from_stays(home: Settings) -> None:
    uri = home.table_uri("minute_metrics")
    pinned = DeltaTable(uri).version()
    DeltaTable(uri).optimize.compact()
    last = DeltaTable(uri).version()
    published(home, minute_metrics=pinned, batch_ledger=10**6)  # that of the ledger is in nobody's log
    age(home)
    report = vacuum(home, dry_run=False, retention=HOUR)
    assert of(report, "minute_metrics").reasons == {pinned: "the published marts were built from it"}
    assert of(report, "batch_ledger").kept_versions == []
    assert readable(home, "minute_metrics", pinned) == readable(home, "minute_metrics", last)

    published(home, minute_metrics=last)
    vacuum(home, dry_run=False, retention=HOUR)
    assert readable(home, "minute_metrics", pinned) is None
    assert readable(home, "minute_metrics", last) is not None


def test_marts_that_do_not_say_what_they_need_stop_it(home: Settings) -> None:
    published(home)
    held = files(home)
    with duckdb.connect(str(home.marts_path)) as marts:
        marts.execute("drop table mart_build")
    with pytest.raises(TableCorruptionError, match="does not say which versions"):
        vacuum(home, dry_run=False, retention=HOUR)
    assert files(home) == held


@pytest.mark.parametrize("retention", [timedelta(0), HOUR - timedelta(seconds=1)])
def test_a_retention_that_is_too_short_is_refused(home: Settings, retention: timedelta) -> None:
    compact(home, None)
    age(home)
    held = files(home)
    with pytest.raises(UsageError, match="too short"):
        vacuum(home, dry_run=False, retention=retention)
    with pytest.raises(UsageError, match="too short"):
        vacuum(load_settings(home=home.home_path, vacuum_retention=retention), dry_run=True)
    assert files(home) == held


def test_not_beside_a_compaction(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECONDS, Patience.SOME, 0.1)
    with exclusive(home, REWRITE), pytest.raises(BusyError):
        vacuum(home, dry_run=False)


def test_no_home(tmp_path: Path) -> None:
    assert vacuum(load_settings(home=tmp_path / "nowhere"), dry_run=False).tables == []


def test_the_index_catches_up_from_files_that_a_compaction_removed(
    spark: SparkSession, home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index of two batches before, as after a kill; the files behind it were put together, and all of it is old."""
    manifest = home.key_index_path / "manifest.json"
    older = home.home_path / "older_index"
    shutil.copytree(home.key_index_path, older)
    covered = json.loads(manifest.read_text())["version"]
    lake.land(home, "events/eu/a.jsonl", traffic(6, range(8, 9)))
    lake.land(home, "events/eu/b.jsonl", traffic(7, range(9, 10)))
    run_ingest(home, spark=spark)
    shutil.rmtree(home.key_index_path)
    shutil.copytree(older, home.key_index_path)
    compact(home, None)
    compacted = [c.version for c in DeltaLog(home.table_uri("events")).commits_backwards() if c.removed and c.version > covered]
    age(home)
    report = vacuum(home, dry_run=False, retention=HOUR)
    assert {version - 1 for version in compacted} <= set(of(report, "events").kept_versions)

    def no_rebuild(*_: object) -> None:
        raise AssertionError("rebuilt")

    monkeypatch.setattr("spark_jobs.ingest.dedupe.index.KeyIndex.rebuild", no_rebuild)
    lake.land(home, "events/eu/c.jsonl", [*traffic(6, range(8, 9)), *traffic(7, range(9, 10)), *traffic(8, range(8, 9))])
    done = run_ingest(home, spark=spark)
    assert (done.accepted, done.duplicate) == (12, 24)
    assert json.loads(manifest.read_text())["version"] > covered

    # the index has caught up: the files may go
    age(home)
    assert of(vacuum(home, dry_run=False, retention=HOUR), "events").files > 0
    monkeypatch.undo()
    shutil.rmtree(home.key_index_path)
    lake.land(home, "events/eu/d.jsonl", traffic(0, range(8, 12)))
    assert run_ingest(home, spark=spark).duplicate == 48


def test_the_last_batch_of_a_topic_is_kept_too(home: Settings) -> None:
    (home.checkpoints_path / "events").rename(home.checkpoints_path / "events-eu-west")
    reasons = of(vacuum(home, dry_run=True, retention=HOUR), "events").reasons
    assert any("last batch of events-eu-west" in reason for reason in reasons.values())


def test_a_killed_batch_is_finished_after_a_vacuum(spark: SparkSession, home: Settings) -> None:
    lake.land(home, "events/eu/x.jsonl", [*traffic(8, range(8, 12)), *traffic(1, range(8, 9))])
    log = home.home_path / "run.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ADTALLY_HOME": str(home.home_path)}
    environment |= {CRASH_VARIABLE: f"after:events:{FILES}"}
    with log.open("wb") as output:
        command = [sys.executable, "-m", "spark_jobs", "ingest"]
        killed = subprocess.run(command, env=environment, cwd=ROOT, stdout=output, stderr=output, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, log.read_text()[-2000:]
    decided_by = DeltaTable(home.table_uri("events")).version() - 1
    compact(home, None)
    shutil.rmtree(home.key_index_path)  # so it is rebuilt from the version before
    age(home)
    report = vacuum(home, dry_run=False, retention=HOUR)
    assert "last batch of events" in of(report, "events").reasons[decided_by]
    assert of(report, "events").files == 3  # its own, of the hours that were compacted: they are in the table all the same
    run_ingest(home, spark=spark)
    total = lake.ledger(spark, home)
    assert (total["accepted"], total["duplicate"]) == (48 * (FILES + 1), 12 * (FILES + 1))
