"""The main job on small landing folders: what is accepted, what is not, and that running again changes nothing."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lake
import pytest
from pyspark.sql import SparkSession

from services.simulator import simulate
from spark_jobs.config import Settings
from spark_jobs.corrections.backfill import backfill
from spark_jobs.errors import (
    AdtallyError,
    BusyError,
    CampaignFileError,
    ConservationError,
    InterruptedIngestError,
    TableCorruptionError,
)
from spark_jobs.ingest.events import EventsJob
from spark_jobs.ingest.orders import OrdersJob
from spark_jobs.ingest.runner import _QueryLoop, run_ingest
from spark_jobs.ingest.stream import StreamJob
from spark_jobs.lake.locks import WRITE_EVENTS, exclusive
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import TABLES
from spark_jobs.operate.fsck import fsck
from spark_jobs.operate.health import read_signal
from spark_jobs.operate.status import read_status
from spark_jobs.operate.watermark import close_by_hand
from spark_jobs.units import HourRange


def test_truth_of_simulated_traffic_to_the_row_and_the_nano(spark: SparkSession, settings: Settings) -> None:
    truth = json.loads(simulate(settings.landing_path, 6_000, seed=11, lines_per_file=600).as_json())
    report = run_ingest(settings.model_copy(update={"max_files_per_batch": 4}), spark=spark)

    def read(table: str, *columns: str, where: str = "true") -> list[Any]:  # by Spark: others of the lake's readers are Spark
        return spark.read.format("delta").load(settings.table_uri(table)).where(where).selectExpr(*columns).collect()

    total = lake.ledger(spark, settings)
    for name in ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "unpriced"):
        assert total[name] == truth["totals"][name], name
    assert report.batches > 3
    hours = ("region", "date_format(event_hour, \"yyyy-MM-dd'T'HH:mm:ss'Z'\")")
    measures = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "unpriced")
    held: dict[tuple[str, str], list[int]] = {}
    for region, hour, *values in read("batch_ledger", *hours, *measures, where="stream = 'events'"):
        cell = held.setdefault((region, hour), [0] * len(measures))
        held[region, hour] = [a + b for a, b in zip(cell, values, strict=True)]
    assert held == {(row["region"], row["event_hour"]): [row[name] for name in measures] for row in truth["accounting"]}
    spend: dict[tuple[str, str, str, str], list[int]] = {}
    hour = "date_format(date_trunc('hour', event_minute), \"yyyy-MM-dd'T'HH:mm:ss'Z'\")"
    sums = ("impressions", "clicks", "spend_nanos")
    gross = [f"{name} + invalid_{name}" for name in sums]  # what rules of activity find is the review's
    for *key, impressions, clicks, nanos in read("minute_metrics", "campaign_id", "region", hour, "currency", *gross):
        cell = spend.setdefault((key[0], key[1], key[2], key[3]), [0, 0, 0])
        for at, value in enumerate((impressions, clicks, nanos)):
            cell[at] += value
    assert spend == {
        (row["campaign_id"], row["region"], row["event_hour"], row["currency"]): [
            row[name] + row[f"invalid_{name}"] for name in sums
        ]
        for row in truth["campaign_hours"]
    }
    orders = read("orders", "status")
    assert orders.count(("cancelled",)) == truth["orders"]["cancelled"]
    assert orders.count(("placed",)) == truth["orders"]["placed"]


class SparkStarts(Exception):
    """Raised in place of the start of a query."""


def test_without_input_spark_does_not_start_and_with_any_it_does(
    spark: SparkSession, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise SparkStarts

    def starts() -> bool:
        with monkeypatch.context() as patched:
            patched.setattr(_QueryLoop, "until_done", refuse)
            try:
                assert run_ingest(settings, spark=spark).batches == 0
            except SparkStarts:
                return True
        return False

    assert starts()  # no query has a checkpoint yet
    lake.land(settings, "events/eu/0.jsonl", [lake.event("a")])
    assert run_ingest(settings, spark=spark).accepted == 1
    assert not starts()
    (settings.checkpoints_path / "orders" / "metadata").rename(settings.home_path / "aside")
    assert starts()
    (settings.home_path / "aside").rename(settings.checkpoints_path / "orders" / "metadata")
    assert not starts()

    assert lake.rows(spark, settings, "campaigns", "campaign_id") == []
    lake.campaigns(settings)
    assert not starts()
    assert lake.rows(spark, settings, "campaigns", "campaign_id") != []  # prices are loaded without Spark

    ended = settings.checkpoints_path / "events" / "commits" / "0"
    content = ended.read_bytes()
    ended.write_bytes(b"")  # torn by a power cut: the batch is ended again
    assert starts()
    ended.write_bytes(content)
    assert not starts()

    last = max(Path(settings.table_uri("batch_ledger"), "_delta_log").glob("*.json"))
    last.rename(last.with_suffix(".lost"))
    with pytest.raises(TableCorruptionError, match="has ended"):
        run_ingest(settings, spark=spark)
    last.with_suffix(".lost").rename(last)
    assert not starts()
    lake.land(settings, "orders/eu/0.jsonl", [lake.order("o")])
    assert starts()
    assert run_ingest(settings, spark=spark).accepted == 1
    assert not starts()


def test_running_again_changes_nothing_and_new_files_are_added(spark: SparkSession, settings: Settings) -> None:
    lake.campaigns(settings)
    lake.land(settings, "events/eu/1.jsonl", [lake.event("e1"), lake.event("e2")])
    assert run_ingest(settings, spark=spark).accepted == 2
    before = lake.everything(spark, settings)
    assert run_ingest(settings, spark=spark).batches == 0
    assert lake.everything(spark, settings) == before
    lake.land(settings, "events/eu/2.jsonl.gz", [lake.event("e2"), lake.event("e3")])
    report = run_ingest(settings, spark=spark)
    assert (report.accepted, report.duplicate) == (1, 1)
    assert lake.rows(spark, settings, "events", "event_id") == [("e1",), ("e2",), ("e3",)]


def test_duplicates_and_conflicts_across_batches_hours_and_regions(spark: SparkSession, settings: Settings) -> None:
    lake.campaigns(settings)
    lake.land(settings, "events/us/1.jsonl", [lake.event("a"), lake.event("b", price_micros=7), lake.event("b", price_micros=8)])
    # the mirror changes region and received_at: a duplicate; another price or time: a conflict, wherever the time lies
    resent = [
        lake.event("a", region="eu", received_at="2025-06-05T00:00:00Z"),
        lake.event("a", event_time="2025-06-02T10:00:00.000001Z"),
        lake.event("b", event_time="2025-05-01T03:00:00Z", received_at="2025-06-02T10:00:02Z"),
        lake.event("c", event_time="2025-06-02T12:00:00+02:00"),
        lake.event("c", event_time="2025-06-02T10:00:00.000000Z", price_micros=1500, placement=None),
    ]
    lake.land(settings, "events/eu/1.jsonl", resent)
    report = run_ingest(settings, spark=spark)
    assert (report.offered, report.accepted, report.duplicate, report.conflict, report.rejected) == (8, 3, 2, 3, 0)
    held = lake.rows(spark, settings, "events", "event_id; region; price_micros")
    assert held == [("a", "us", 1500), ("b", "us", 7), ("c", "eu", 1500)]
    conflicts = lake.rows(
        spark, settings, "rejected_events", "record_id; source_file; source_line; fingerprint != accepted_fingerprint; raw"
    )
    assert [(c[0], c[1], c[2], c[3]) for c in conflicts] == [
        ("a", "events/eu/1.jsonl", 2, True),
        ("b", "events/eu/1.jsonl", 3, True),
        ("b", "events/us/1.jsonl", 3, True),
    ]
    assert json.loads(conflicts[0][4]) == resent[1]
    fingerprints = dict(
        lake.rows(spark, settings, "rejected_events", "source_file; accepted_fingerprint", "record_id = 'b' and source_line = 3")
    )
    stored = lake.rows(spark, settings, "events", "lower(lpad(hex(fingerprint), 16, '0'))", "event_id = 'b'")
    assert set(fingerprints.values()) == {stored[0][0]}


def test_money_late_future_and_unpriced(spark: SparkSession, settings: Settings) -> None:
    lake.campaigns(settings)
    lake.land(
        settings,
        "events/eu/1.jsonl",
        [
            lake.event("cpm", price_micros=3),
            lake.event("cpm-click", event_type="click"),
            lake.event("cpc", campaign_id="c-cpc"),
            lake.event("cpc-click", campaign_id="c-cpc", event_type="click", price_micros=250_000),
            lake.event("unknown", campaign_id="nobody", event_type="click"),
            lake.event("in-time", received_at="2025-06-02T11:14:59.999999Z"),
            lake.event("late", received_at="2025-06-02T11:15:00Z", price_micros=None),
            lake.event("days-late", received_at="2025-06-09T00:00:00Z"),
            lake.event("skewed", event_time="2025-06-02T10:05:00Z", received_at="2025-06-02T10:00:00Z"),
            lake.event("future", event_time="2025-06-02T10:05:00.000001Z", received_at="2025-06-02T10:00:00Z"),
        ],
    )
    report = run_ingest(settings, spark=spark)
    assert (report.accepted, report.rejected, report.late) == (9, 1, 2)
    spend = dict(lake.rows(spark, settings, "events", "event_id; spend_nanos"))
    assert (spend["cpm"], spend["cpm-click"], spend["cpc"], spend["cpc-click"], spend["unknown"]) == (3, 0, 0, 250_000_000, 0)
    assert lake.rows(spark, settings, "events", "event_id", "is_late") == [("days-late",), ("late",)]
    total = lake.ledger(spark, settings)
    assert total["unpriced"] == 1
    assert total["spend_nanos"] == sum(spend.values())
    assert lake.rows(spark, settings, "rejected_events", "record_id; reason_codes") == [("future", ["event_time_in_future"])]
    # the clock of the future harms no later batch
    lake.land(settings, "events/eu/2.jsonl", [lake.event("next")])
    assert run_ingest(settings, spark=spark).late == 0


def test_bad_input_is_kept_with_reason_file_and_line(spark: SparkSession, settings: Settings) -> None:
    lake.campaigns(settings)
    good = lake.lines([lake.event("good-1")])
    bad: list[tuple[bytes, str]] = [
        (b"nonsense", "not_json"),
        (b"[1]", "not_an_object"),
        (b"", "blank_line"),
        (b'{"pad":"' + b"x" * 70_000 + b'"}', "line_too_long"),
        (lake.lines([lake.event("x1", user_id=None)])[:-1], "user_id_missing"),
        (lake.lines([lake.event("x2", price_micros="5")])[:-1], "price_micros_type"),
        (lake.lines([lake.event("x3", price_micros=10**12 + 1)])[:-1], "price_micros_range"),
        (lake.lines([lake.event("x4")])[:-2] + b',"event_id":"y"}', "duplicate_key"),
        (lake.lines([lake.event("x5", event_type="view")])[:-1], "event_type_unknown"),
        (lake.lines([lake.event("x6", currency="eur")])[:-1], "currency_unknown"),
        (lake.lines([lake.event("x7", region="us")])[:-1], "region_mismatch"),
        (lake.lines([lake.event("x8", event_time="2025-06-02T10:00:00")])[:-1], "event_time_format"),
        (lake.lines([lake.event("x9", event_time="1970-01-01T00:00:00Z")])[:-1], "event_time_out_of_range"),
        (b"\xef\xbb\xbf" + lake.lines([lake.event("x10")])[:-1], "byte_order_mark"),
        (lake.lines([lake.event("x11")])[:-1] + b"\r", "crlf"),
        (lake.lines([lake.event("x12")])[:-1].replace(b"u-1", b"u\x00"), "nul_byte"),
        (lake.lines([lake.event("x13")])[:-1].replace(b"u-1", b"\xff\xfe"), "invalid_utf8"),
    ]
    content = good + b"".join(line + b"\n" for line, _ in bad) + lake.lines([lake.event("good-2")]) + b'{"event_id": "cut'
    lake.land(settings, "events/eu/bad.jsonl", content)
    report = run_ingest(settings, spark=spark)
    assert (report.offered, report.accepted, report.rejected) == (len(bad) + 3, 2, len(bad) + 1)
    held = lake.rows(spark, settings, "rejected_events", "source_line; reason_codes; raw; raw_encoding; source_file")
    by_line = {row[0]: row for row in held}
    for number, (line, reason) in enumerate(bad, start=2):
        _, reasons, raw, encoding, name = by_line[number]
        assert reason in reasons, (number, reason, reasons)
        assert name == "events/eu/bad.jsonl"
        assert (base64.b64decode(raw) if encoding == "base64" else raw.encode()) == line
    assert by_line[len(bad) + 3][1] == ["not_json", "unterminated_line"]
    assert lake.ledger(spark, settings)["offered"] == len(bad) + 3


def test_broken_gzip_files_do_not_stop_the_stream(spark: SparkSession, settings: Settings) -> None:
    whole = gzip.compress(lake.lines(lake.event(f"g{i}") for i in range(200)))
    lake.land(settings, "events/eu/1-empty.jsonl.gz", b"")
    lake.land(settings, "events/eu/2-no-gzip.jsonl.gz", b"no gzip at all")
    lake.land(settings, "events/eu/3-cut.jsonl.gz", whole[: len(whole) * 2 // 3])
    lake.land(settings, "events/eu/4-nothing.jsonl", b"")
    lake.land(settings, "events/eu/5-unterminated.jsonl", lake.lines([lake.event("last")])[:-1])
    report = run_ingest(settings, spark=spark)
    faults = lake.rows(spark, settings, "rejected_events", "source_file; source_line; reason_codes")
    assert [(name, reasons) for name, _, reasons in faults] == [
        ("events/eu/1-empty.jsonl.gz", ["empty_gzip"]),
        ("events/eu/2-no-gzip.jsonl.gz", ["corrupt_gzip"]),
        ("events/eu/3-cut.jsonl.gz", ["truncated_gzip"]),
    ]
    assert [line for _, line, _ in faults[:2]] == [0, 0]
    assert report.accepted == faults[2][1]  # the lines before the cut, and the one without an end
    assert ("last",) in lake.rows(spark, settings, "events", "event_id")


def test_orders_whatever_their_order(spark: SparkSession, settings: Settings) -> None:
    lake.land(
        settings, "orders/eu/1.jsonl", [lake.order("o1"), lake.order("o2"), lake.order("o2"), lake.order("o2", total_micros=1)]
    )
    lake.land(settings, "orders/us/1.jsonl", [lake.order("o3", status="cancelled"), lake.order("o1", status="cancelled")])
    lake.land(settings, "orders/eu/2.jsonl", [lake.order("o3"), lake.order("o1"), lake.order("o4", total_micros=-1)])
    report = run_ingest(settings, spark=spark)
    assert (report.offered, report.accepted, report.duplicate, report.conflict, report.rejected) == (9, 5, 2, 1, 1)
    assert lake.rows(spark, settings, "orders", "order_id; status; has_placed") == [
        ("o1", "cancelled", True),
        ("o2", "placed", True),
        ("o3", "cancelled", True),
    ]
    assert lake.rows(spark, settings, "rejected_orders", "record_id; outcome; source_line") == [
        ("o2", "conflict", 4),
        ("o4", "rejected", 3),
    ]
    assert run_ingest(settings, spark=spark).batches == 0


def test_lost_checkpoint_replays_to_the_same_rows_and_skips_nothing(spark: SparkSession, settings: Settings) -> None:
    simulate(settings.landing_path, 2_000, seed=5, lines_per_file=500)
    run_ingest(settings.model_copy(update={"max_files_per_batch": 2}), spark=spark)
    before = lake.everything(spark, settings)
    uuids = lake.rows(spark, settings, "minute_metrics", "record_uuid")
    shutil.rmtree(settings.checkpoints_path)
    replay = run_ingest(settings, spark=spark)
    after = lake.everything(spark, settings)
    for table in ("events", "minute_metrics", "orders"):
        assert after[table] == before[table], table
    assert lake.rows(spark, settings, "minute_metrics", "record_uuid") == uuids
    assert replay.accepted == 0
    lake.land(settings, "events/eu-west/new.jsonl", [lake.event("brand-new")])
    assert run_ingest(settings, spark=spark).accepted == 1


def _leave(checkpoint: Path, *names: str) -> None:
    """Take the end of the first batch away, and make files empty, as a power cut does."""
    shutil.rmtree(checkpoint / "commits")
    for name in names:
        (checkpoint / name).write_bytes(b"")


def _leave_half_an_offset(checkpoint: Path) -> None:
    """A process was killed while Spark wrote the first plan."""
    _leave(checkpoint)
    (checkpoint / "offsets" / "0").rename(checkpoint / "offsets" / ".0.ec53a8c1.tmp")
    (checkpoint / "offsets" / ".0.crc").unlink()


def _leave_no_metadata(checkpoint: Path) -> None:
    _leave(checkpoint)
    (checkpoint / "metadata").unlink()
    (checkpoint / ".metadata.crc").unlink()


@pytest.mark.parametrize(
    "leave",
    [
        pytest.param(lambda folder: _leave(folder, "offsets/0"), id="torn plan"),
        pytest.param(lambda folder: _leave(folder, "metadata", "sources/0/0", "offsets/0"), id="all is torn"),
        pytest.param(_leave_half_an_offset, id="temporary file"),
        pytest.param(_leave_no_metadata, id="no metadata"),
    ],
)
def test_a_first_batch_that_was_never_planned_whole_is_planned_again(
    leave: Callable[[Path], None], spark: SparkSession, settings: Settings
) -> None:
    """Spark takes no checkpoint without a whole plan in which any file lies, even a hidden one."""
    lake.land(settings, "events/eu/1.jsonl", [lake.event(f"e{i}") for i in range(5)])
    run_ingest(settings, spark=spark)
    for table in TABLES:
        shutil.rmtree(settings.table_uri(table))
    leave(settings.checkpoints_path / "events")
    lake.land(settings, "events/eu/2.jsonl", [lake.event(f"e{i}") for i in range(7)])
    report = run_ingest(settings, spark=spark)
    assert (report.offered, report.accepted) == (12, 7)


def test_lost_index_is_rebuilt_from_the_table(spark: SparkSession, settings: Settings) -> None:
    lake.land(settings, "events/eu/1.jsonl", [lake.event(f"e{i}") for i in range(50)])
    run_ingest(settings, spark=spark)
    shutil.rmtree(settings.key_index_path)
    lake.land(settings, "events/eu/2.jsonl", [lake.event(f"e{i}") for i in range(60)])
    report = run_ingest(settings, spark=spark)
    assert (report.accepted, report.duplicate) == (10, 50)


def _flip(data: bytearray) -> None:
    data[100] ^= 1


def _zero(data: bytearray) -> None:
    data[4096:8192] = bytes(4096)


@pytest.mark.parametrize("damage", [_flip, _zero])
def test_a_damaged_index_lets_nothing_count_twice(
    spark: SparkSession, settings: Settings, damage: Callable[[bytearray], None]
) -> None:
    events = [lake.event(f"e{number}") for number in range(1500)]
    lake.land(settings, "events/eu-west/a.jsonl", events)
    run_ingest(settings, spark=spark)
    (path,) = settings.key_index_path.glob("run-*.keys")
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    lake.land(settings, "events/us-east/again.jsonl", events)
    said: list[str] = []
    report = run_ingest(settings, spark=spark, notice=said.append)
    assert (report.accepted, report.duplicate) == (0, 1500)
    assert len(said) == 1 and "the key index is rebuilt" in said[0] and "damaged at byte" in said[0]
    lake.land(settings, "events/us-east/more.jsonl", [lake.event("new"), events[0]])
    report = run_ingest(settings, spark=spark, notice=said.append)
    assert (report.accepted, report.duplicate, len(said)) == (1, 1, 1)


def _versions(settings: Settings) -> dict[str, int | None]:
    return {name: DeltaLog(settings.table_uri(name)).latest_version() for name in TABLES}


def _stop_before(patch: pytest.MonkeyPatch, job: type[StreamJob[Any]], step: str) -> None:
    """Let a batch fail right before a step, as a kill would."""

    def stop(*_: object) -> None:
        raise RuntimeError("killed")

    patch.setattr(job, step, stop)


SOURCES = [
    pytest.param("events", EventsJob, [lake.event("e1"), lake.event("e2"), {}], id="events"),
    pytest.param("orders", OrdersJob, [lake.order("o1"), lake.order("o2"), {}], id="orders"),
]


@pytest.mark.parametrize("way_out", ["put back", "fsck"])
@pytest.mark.parametrize(("stream", "job", "records"), SOURCES)
def test_a_file_that_changed_between_a_crash_and_the_restart(
    spark: SparkSession, settings: Settings, stream: str, job: type[StreamJob[Any]], records: list[dict[str, Any]], way_out: str
) -> None:
    path = lake.land(settings, f"{stream}/eu-west/a.jsonl", records)
    whole, at = path.read_bytes(), path.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AdtallyError, match="killed"):
        _stop_before(patch, job, "commit_derived")
        run_ingest(settings, spark=spark)
    before = _versions(settings)
    path.write_bytes(whole.replace(b"s-1", b"s-2"))  # as long, and as old
    os.utime(path, ns=(at, at))
    with pytest.raises(ConservationError, match=f"{stream}/eu-west/a.jsonl changed or vanished after batch 0") as caught:
        run_ingest(settings, spark=spark)
    assert "fsck" in str(caught.value)
    assert [(found.kind, found.place) for found in fsck(settings).findings] == [("batch_file_changed", stream)]
    if way_out == "put back":
        assert {name for name, version in _versions(settings).items() if version != before[name]} == set()
        path.write_bytes(whole)
    else:
        path.unlink()
        assert [found.is_repaired for found in fsck(settings, repair=True).findings] == [True]
        assert fsck(settings).findings == []
    run_ingest(settings, spark=spark)
    lake.land(settings, f"{stream}/eu-west/b.jsonl", records)  # and the stream goes on
    run_ingest(settings, spark=spark)
    total = lake.ledger(spark, settings, stream)
    assert (total["offered"], total["accepted"], total["duplicate"], total["rejected"]) == (6, 2, 2, 2)
    assert read_status(settings).conservation_holds


@pytest.mark.parametrize(("stream", "job", "records"), SOURCES)
def test_what_runs_again_must_give_what_was_committed(
    spark: SparkSession, settings: Settings, monkeypatch: pytest.MonkeyPatch, stream: str, job: type[StreamJob[Any]], records: Any
) -> None:
    """Behind the fingerprint, which sees both ends of a file: the accepted records are held to those in the table."""
    path = lake.land(settings, f"{stream}/eu-west/a.jsonl", records)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AdtallyError, match="killed"):
        _stop_before(patch, job, "commit_derived")
        run_ingest(settings, spark=spark)
    before = _versions(settings)
    monkeypatch.setattr(StreamJob, "_refuse_changed_files", lambda *_: None)
    path.write_bytes(path.read_bytes().replace(b"s-1", b"s-2"))
    with pytest.raises(ConservationError, match=r"batch 0 of .*(differ from those|is not as version)"):
        run_ingest(settings, spark=spark)
    assert {name for name, version in _versions(settings).items() if version != before[name]} <= {f"rejected_{stream}"}
    assert _versions(settings) == before


@pytest.mark.parametrize(("stream", "job", "records"), SOURCES)
def test_a_batch_that_does_not_add_up_is_not_committed(
    spark: SparkSession,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    stream: str,
    job: type[StreamJob[Any]],
    records: list[dict[str, Any]],
) -> None:
    path = lake.land(settings, f"{stream}/eu-west/a.jsonl", records)
    before = _versions(settings)
    stage, write = job._stage, job._write

    def line_more(self: StreamJob[Any], *arguments: Any) -> Any:
        batch = stage(self, *arguments)
        batch.splits[0] = replace(batch.splits[0], offered=batch.splits[0].offered + 1)
        return batch

    def reject_less(*arguments: Any) -> Any:
        return [replace(part, rejected_records=0) for part in write(*arguments)]

    def file_grows(*arguments: Any) -> Any:
        with path.open("ab") as file:
            file.write(b"{}\n")
        return write(*arguments)

    defects = {
        "_stage": (line_more, "4 lines offered, 3 accounted for"),
        "_write": (reject_less, "1 conflicting and rejected, but 0"),
    }
    for name, (defect, said) in defects.items():
        with monkeypatch.context() as patch, pytest.raises(ConservationError, match=said):
            patch.setattr(job, name, defect)
            run_ingest(settings, spark=spark)
    with monkeypatch.context() as patch, pytest.raises(ConservationError, match=r"changed while batch 0 of .* read it"):
        patch.setattr(job, "_write", file_grows)
        run_ingest(settings, spark=spark)
    changed = {name for name, version in _versions(settings).items() if version != before[name]}
    assert changed <= {"campaigns", "rule_sets"}  # by which it was planned
    run_ingest(settings, spark=spark)
    total = lake.ledger(spark, settings, stream)
    assert (total["offered"], total["accepted"], total["rejected"]) == (4, 2, 2)


def test_a_lost_commit_of_the_ledger_is_mended_by_fsck(spark: SparkSession, settings: Settings) -> None:
    for name in "ab":
        lake.land(settings, f"events/eu-west/{name}.jsonl", [lake.event(f"{name}{number}") for number in range(3)])
    run_ingest(settings, spark=spark)
    before = lake.ledger(spark, settings)
    log = DeltaLog(settings.table_uri("batch_ledger"))
    Path(log.commit_path(log.latest_version() or 0)).unlink()
    with pytest.raises(TableCorruptionError, match="fsck"):
        run_ingest(settings, spark=spark)
    assert {found.kind for found in fsck(settings).findings} >= {"checkpoint"}
    report = fsck(settings, repair=True)
    assert report.remaining == [], report.remaining
    assert lake.ledger(spark, settings) == before
    run_ingest(settings, spark=spark)
    assert lake.ledger(spark, settings)["accepted"] == before["accepted"]
    assert read_status(settings).conservation_holds


def test_rows_deleted_by_hand_are_not_remembered(spark: SparkSession, settings: Settings) -> None:
    lake.land(settings, "events/eu/1.jsonl", [lake.event("kept"), lake.event("deleted")])
    run_ingest(settings, spark=spark)
    spark.sql(f"delete from delta.`{settings.table_uri('events')}` where event_id = 'deleted'")
    lake.land(settings, "events/eu/2.jsonl", [lake.event("kept"), lake.event("deleted")])
    report = run_ingest(settings, spark=spark)
    assert (report.accepted, report.duplicate) == (1, 1)


def test_compaction_between_batches_changes_nothing(spark: SparkSession, settings: Settings) -> None:
    lake.land(settings, "events/eu/1.jsonl", [lake.event("a")])
    lake.land(settings, "events/eu/2.jsonl", [lake.event("b")])
    run_ingest(settings, spark=spark)
    spark.sql(f"optimize delta.`{settings.table_uri('events')}`")
    lake.land(settings, "events/eu/3.jsonl", [lake.event("a"), lake.event("c")])
    report = run_ingest(settings, spark=spark)
    assert (report.accepted, report.duplicate) == (1, 1)


def test_record_uuids_name_the_batch_and_the_key(spark: SparkSession, settings: Settings) -> None:
    lake.land(settings, "events/eu/1.jsonl", [lake.event("a", placement="x"), lake.event("b", placement=None)])
    lake.land(settings, "events/eu/2.jsonl", [lake.event("c", placement="x"), lake.event("d", placement="")])
    run_ingest(settings, spark=spark)
    held = lake.rows(spark, settings, "minute_metrics", "record_uuid; _batch_id; placement")
    assert len({uuid for uuid, *_ in held}) == 4
    assert all(len(uuid) == 36 and uuid.count("-") == 4 for uuid, *_ in held)


def test_a_second_ingest_on_one_home_is_refused(spark: SparkSession, settings: Settings) -> None:
    from filelock import FileLock

    with FileLock(settings.home_path / ".ingest.lock"), pytest.raises(BusyError, match="another ingest"):
        run_ingest(settings, spark=spark)


def test_a_wrong_campaign_file_stops_before_anything_is_written(spark: SparkSession, settings: Settings) -> None:
    lake.campaigns(settings, "c,s,cpc,1,EUR,2025-01-01,2025-03-01", "c,s,cpm,1,EUR,2025-02-01,")
    lake.land(settings, "events/eu/1.jsonl", [lake.event("a")])
    with pytest.raises(CampaignFileError, match="overlap"):
        run_ingest(settings, spark=spark)
    assert lake.rows(spark, settings, "events", "event_id") == []


def test_a_failed_batch_says_its_cause_first(spark: SparkSession, settings: Settings) -> None:
    lake.land(settings, "events/eu/1.jsonl", [lake.event("a")])
    blocked = Path(settings.table_uri("events")) / "event_date=2025-06-02"
    blocked.write_bytes(b"")  # where the tasks need a folder
    with pytest.raises(AdtallyError) as caught:
        run_ingest(settings, spark=spark)
    assert re.match(
        r"\w*Error: [^(]*event_date=2025-06-02.* at spark_jobs/lake/data_files.py:\d+: the events stream failed", str(caught.value)
    )
    blocked.unlink()
    assert run_ingest(settings, spark=spark).accepted == 1


def test_a_signal_in_the_last_batch_has_stopped_nothing_and_one_before_it_has(spark: SparkSession, settings: Settings) -> None:
    def stop(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    lake.land(settings, "events/eu/1.jsonl", [lake.event("a")])
    assert run_ingest(settings, spark=spark, progress=stop).accepted == 1
    lake.land(settings, "events/eu/2.jsonl", [lake.event("b")])
    lake.land(settings, "events/eu/3.jsonl", [lake.event("c")])
    with pytest.raises(InterruptedIngestError):
        run_ingest(settings, spark=spark, progress=stop)
    assert lake.rows(spark, settings, "events", "event_id") == [("a",), ("b",)]
    assert run_ingest(settings, spark=spark).accepted == 1


def test_a_campaign_file_that_turns_bad_leaves_the_prices_in_force(spark: SparkSession, settings: Settings) -> None:
    lake.campaigns(settings)
    lake.land(settings, "events/eu/1.jsonl", [lake.event("a")])
    run_ingest(settings, spark=spark)
    lake.campaigns(settings, "c-cpm,s-1,cpm,1,EUR,2000-01-01,", "c-cpc,s-1,cpc,,EUR,2000-01-01,")
    for number in (2, 3):  # two batches
        lake.land(settings, f"events/eu/{number}.jsonl", [lake.event(f"b{number}")])
    lake.land(settings, "orders/eu/1.jsonl", [lake.order("o")])
    said: list[str] = []
    assert run_ingest(settings, spark=spark, notice=said.append).accepted == 3
    problem = "campaigns/campaigns.csv, line 3: daily_budget_micros must have 1 to 128 characters; the prices in force stay"
    assert said == [problem]
    assert lake.rows(spark, settings, "events", "spend_nanos") == [(1500,)] * 3
    status = read_status(settings)
    assert (status.conservation_holds, status.problems) == (True, [problem])
    signal = read_signal(settings, "campaign_file")
    assert (signal.ok, signal.detail) == (False, problem)
    close_by_hand(settings, datetime(2025, 6, 2, 12, tzinfo=UTC), reason="test", closed_by="test")
    with pytest.raises(CampaignFileError, match="daily_budget_micros must have"):  # it is for today's prices
        backfill(settings, HourRange.of(datetime(2025, 6, 2, 10, tzinfo=UTC)), reason="prices")

    lake.campaigns(settings, "c-cpm,s-1,cpc,1,EUR,2000-01-01,")
    lake.land(settings, "events/eu/4.jsonl", [lake.event("c")])
    run_ingest(settings, spark=spark, notice=said.append)
    assert said == [problem]
    assert lake.rows(spark, settings, "events", "spend_nanos", "event_id = 'c'") == [(0,)]
    assert read_status(settings).problems == [] and read_signal(settings, "campaign_file").ok


def test_campaigns_are_brought_in_when_nobody_else_writes(spark: SparkSession, settings: Settings) -> None:
    lake.campaigns(settings)
    with exclusive(settings, WRITE_EVENTS):  # as a backfill does, which brings them in too
        ingest = threading.Thread(target=run_ingest, args=(settings,), kwargs={"spark": spark})
        ingest.start()
        ingest.join(3)
        assert ingest.is_alive()
        assert lake.rows(spark, settings, "campaigns", "campaign_id") == []
    ingest.join()
    assert lake.rows(spark, settings, "campaigns", "campaign_id") == [("c-cpc",), ("c-cpm",)]
