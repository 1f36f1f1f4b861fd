"""Health signals, on homes made of Delta commits, landing files and checkpoints as Spark writes them."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from lake import campaigns, event, land
from local import LocalEvents
from pyspark.sql import SparkSession

from spark_jobs.config import Settings, load_settings
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.lake.tables import BATCH_LEDGER
from spark_jobs.operate.health import SIGNALS, Signal, read_signal
from spark_jobs.traffic.review import review

NOW = datetime.now(UTC)


def signal(settings: Settings, name: str, *, after: timedelta = timedelta(0)) -> Signal:
    return read_signal(settings, name, now=datetime.now(UTC) + after)


def read_all(settings: Settings) -> list[Signal]:
    return [read_signal(settings, name) for name in SIGNALS]


def checkpoint(settings: Settings, stream: str, finished: int, batches: list[list[Path]]) -> None:
    """A checkpoint whose batches read these files, of which those through ``finished`` have ended."""
    folder = settings.checkpoints_path / stream
    for name in ("offsets", "commits", "sources/0"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, files in enumerate(batches):
        entries = [json.dumps({"path": f.as_uri(), "timestamp": 1, "batchId": number}) for f in files]
        (folder / "sources" / "0" / str(number)).write_text("\n".join(["v1", *entries]))
        offset = [json.dumps({"batchTimestampMs": 1}), json.dumps({"logOffset": number})]
        (folder / "offsets" / str(number)).write_text("\n".join(["v1", *offset]))
        if number <= finished:
            (folder / "commits" / str(number)).write_text("v1\n{}")


def book(settings: Settings, **counts: Any) -> None:
    """One row of the ledger, in a commit of its own."""
    zero = dict.fromkeys((f.name for f in BATCH_LEDGER.schema if f.type in (pa.int64(), pa.decimal128(38, 0))), 0)
    row = {**zero, "stream": "events", "source": "files", "region": "eu", "ingested_at": NOW, "_query_id": "q", **counts}
    write_deltalake(settings.table_uri("batch_ledger"), pa.Table.from_pylist([row], BATCH_LEDGER.schema), mode="append")


def publish(settings: Settings, version: int) -> None:
    settings.marts_path.parent.mkdir(parents=True, exist_ok=True)
    settings.marts_path.unlink(missing_ok=True)
    with duckdb.connect(str(settings.marts_path)) as connection:
        connection.execute(f"create table mart_build as select 'batch_ledger' as table_name, {version}::bigint as delta_version")


def test_an_empty_home_is_well(tmp_path: Path) -> None:
    found = read_all(load_settings(home=tmp_path / "nowhere", min_free_bytes=0))
    assert [each.name for each in found] == list(SIGNALS)
    assert [each for each in found if not each.ok] == []
    assert not (tmp_path / "nowhere").exists()


def test_empty_tables_are_well(settings: Settings) -> None:
    assert [each.name for each in read_all(settings) if not each.ok and each.name != "disk_space"] == []


def test_every_runbook_is_there(settings: Settings) -> None:
    root = Path(__file__).parents[3]
    assert [each.runbook for each in read_all(settings) if not (root / each.runbook).is_file()] == []


def test_lag_is_that_of_the_oldest_file_that_no_finished_batch_read(settings: Settings) -> None:
    first, second, third = (land(settings, f"events/eu/{n}.jsonl", b"{}\n") for n in range(3))
    for stranger in ("events/loose.jsonl", "events/eu/.hidden.jsonl", "events/eu/notes.txt", "events/eu/deep/x.jsonl"):
        path = settings.landing_path / stranger
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}\n")
    assert signal(settings, "stream_lag").ok  # they have only just arrived, whatever their modification time says
    late = signal(settings, "stream_lag", after=timedelta(minutes=3))
    assert not late.ok
    assert late.value == pytest.approx(180, abs=30)
    assert "events/eu: 3 files waiting" in late.detail
    checkpoint(settings, "events", finished=0, batches=[[first], [second, third]])
    assert "events/eu: 2 files waiting" in signal(settings, "stream_lag").detail  # those of a batch that has not ended
    checkpoint(settings, "events", finished=1, batches=[[first], [second, third]])
    assert signal(settings, "stream_lag", after=timedelta(days=1)) == Signal(
        "stream_lag", True, 0.0, 120.0, "seconds", "no landing file waits", "docs/runbooks/stream-lag.md"
    )
    land(settings, "orders/eu/1.jsonl", b"{}\n")
    assert "orders/eu: 1 file waiting" in signal(settings, "stream_lag", after=timedelta(days=1)).detail


def test_files_that_nothing_reads_are_named(settings: Settings) -> None:
    well = signal(settings, "ignored_files")
    assert (well.ok, well.value, well.detail) == (True, 0.0, "whatever lies in the landing folder is read")
    land(settings, "events/eu/1.jsonl", b"{}\n")
    land(settings, "events/eu/1.json", b"{}\n")
    land(settings, "events/eu/day=1/1.jsonl", b"{}\n")
    bad = signal(settings, "ignored_files")
    assert (bad.ok, bad.value, bad.runbook) == (False, 2.0, "docs/runbooks/ignored-files.md")
    assert "1 in events/eu (the name ends in neither .jsonl" in bad.detail
    assert "such as events/eu/day=1/1.jsonl" in bad.detail


def test_a_file_that_was_changed_after_it_was_read_is_named(settings: Settings) -> None:
    """Spark reads a name once."""
    file = land(settings, "events/eu/latest.jsonl", b"{}\n")
    checkpoint(settings, "events", finished=0, batches=[[file]])
    os.utime(file, (0.001, 0.001))
    assert signal(settings, "ignored_files").ok
    os.utime(file, (5, 5))
    assert "changed after it was read" in signal(settings, "ignored_files").detail


def test_files_that_the_compacted_list_names_were_read(settings: Settings) -> None:
    files = [land(settings, f"events/eu/{n}.jsonl", b"{}\n") for n in range(3)]
    checkpoint(settings, "events", finished=2, batches=[[file] for file in files])
    log = settings.checkpoints_path / "events" / "sources" / "0"
    lines = [line for n in (0, 1) for line in (log / str(n)).read_text().splitlines()[1:]]
    (log / "1.compact").write_text("\n".join(["v1", *lines]))
    for n in (0, 1):
        (log / str(n)).unlink()
    assert signal(settings, "stream_lag").detail == "no landing file waits"


def test_a_checkpoint_that_cannot_be_read_is_not_well(settings: Settings) -> None:
    file = land(settings, "events/eu/1.jsonl", b"{}\n")
    checkpoint(settings, "events", finished=0, batches=[[file]])
    (settings.checkpoints_path / "events" / "sources" / "0" / "0").write_text("v9\n")
    found = signal(settings, "stream_lag")
    assert not found.ok
    assert found.value is None
    assert found.detail.startswith("cannot be measured: ")


def test_freshness_counts_from_the_first_change_that_the_marts_lack(settings: Settings) -> None:
    assert signal(settings, "freshness").detail == "nothing ingested yet" or signal(settings, "freshness").value == 0
    book(settings, offered=1, accepted=1)
    late = signal(settings, "freshness", after=timedelta(minutes=16))
    assert not late.ok
    assert late.value == pytest.approx(960, abs=30)
    assert late.detail == "there are no marts yet"
    publish(settings, 1)
    assert signal(settings, "freshness", after=timedelta(days=1)).value == 0
    book(settings, offered=1, accepted=1)
    behind = signal(settings, "freshness", after=timedelta(minutes=16))
    assert (behind.ok, behind.detail) == (False, "the marts have batch_ledger at version 1 of 2")


@pytest.mark.parametrize(
    ("rows", "rejected", "duplicate"),
    [
        pytest.param([{"offered": 900, "rejected": 900}], True, True, id="too few to say"),
        pytest.param([{"offered": 1000, "rejected": 50, "duplicate": 250}], True, True, id="just at the thresholds"),
        pytest.param([{"offered": 1000, "rejected": 51}], False, True, id="too many rejected"),
        pytest.param([{"offered": 1000, "duplicate": 251}], True, False, id="too many resent"),
        pytest.param([{"offered": 900, "rejected": 51}, {"offered": 100, "stream": "orders"}], False, True, id="of both streams"),
        pytest.param([{"offered": 1000}, {"rejected": 500, "_run_id": "r-1"}], True, True, id="a correction is none"),
    ],
)
def test_shares_of_what_was_offered_in_the_last_hour(
    settings: Settings, rows: list[dict[str, Any]], rejected: bool, duplicate: bool
) -> None:
    for row in rows:
        book(settings, **row)
    assert signal(settings, "rejected_share").ok == rejected
    assert signal(settings, "duplicate_share").ok == duplicate
    later = signal(settings, "rejected_share", after=timedelta(minutes=61))
    assert (later.ok, later.detail) == (True, "0 rejected of 0 offered in the last hour")


def test_the_share_of_one_user(settings: Settings) -> None:
    stream = LocalEvents(settings)
    stream.take([event(f"a{n}", user_id=f"u-{n}") for n in range(700)] + [event(f"b{n}", user_id="a99f214a") for n in range(299)])
    few = signal(settings, "user_share")
    assert (few.ok, few.value) == (True, 0.0)  # too few to say
    stream.take([event(f"c{n}", user_id="Unknown") for n in range(201)])
    many = signal(settings, "user_share")
    assert (many.ok, many.value) == (False, 299 / 1200)
    assert many.detail == "299 of 1,200 events in the last hour are of user 'a99f214a'"
    review(settings)  # rewrites rows, which are no new events
    assert signal(settings, "user_share") == many
    settings.rules_path.mkdir()
    (settings.rules_path / "invalid_traffic.toml").write_text('exempt_users = ["A99F214A"]\n')
    known = signal(settings, "user_share")
    assert (known.ok, known.value) == (True, 201 / 1200)
    assert signal(settings, "user_share", after=timedelta(minutes=61)).value == 0


def test_conservation_of_the_last_hour(spark: SparkSession, settings: Settings) -> None:
    campaigns(settings)
    land(settings, "events/eu/1.jsonl", [event("e-1"), event("e-2"), event("e-1"), event("e-2", price_micros=7)])
    land(settings, "events/eu/2.jsonl", [event("e-3"), {"event_id": "broken"}])
    run_ingest(settings, spark=spark)
    assert signal(settings, "stream_lag").detail == "no landing file waits"
    well = signal(settings, "conservation")
    assert (well.ok, well.value, well.detail) == (True, 0.0, "2 batches of the last hour: all adds up")
    lost = spark.read.format("delta").load(settings.table_uri("events")).where("event_id <> 'e-3'").toArrow()
    write_deltalake(settings.table_uri("events"), lost, mode="overwrite")
    bad = signal(settings, "conservation")
    assert not bad.ok
    assert (
        "batch 1 of events, eu, hour 2025-06-02T10Z: accepted is 1 in batch_ledger, 0 in events, 1 in minute_metrics" in bad.detail
    )
    assert signal(settings, "conservation", after=timedelta(hours=2)).detail == "0 batches of the last hour: all adds up"


def test_a_table_that_is_gone_breaks_conservation(spark: SparkSession, settings: Settings) -> None:
    land(settings, "events/eu/1.jsonl", [event("e-1")])
    run_ingest(settings, spark=spark)
    os.rename(settings.table_uri("minute_metrics"), settings.table_uri("gone"))
    found = signal(settings, "conservation")
    assert (found.ok, found.detail) == (False, "table minute_metrics is missing, but others hold rows")


def test_disk_space(settings: Settings) -> None:
    usage = shutil.disk_usage(settings.home_path)
    assert signal(load_settings(home=settings.home, min_free_bytes=usage.free * 2), "disk_space").ok is False
    assert signal(load_settings(home=settings.home, min_free_bytes=usage.free // 2), "disk_space").ok is True
