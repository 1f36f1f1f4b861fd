"""Compaction: the same rows in fewer files, whoever reads or writes meanwhile."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lake
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from killed import run_code
from pyspark.sql import SparkSession

from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import BusyError, TableCorruptionError, UsageError
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.locks import REWRITE, SECONDS, Patience, exclusive
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.reading import TableFile
from spark_jobs.lake.rewrite import rearrange
from spark_jobs.lake.tables import EVENTS, ORDERS, TABLES
from spark_jobs.lake.writes import merge_orders
from spark_jobs.operate import compact as module
from spark_jobs.operate.compact import LATE_FILES, LOOSE_FILES, CompactReport, TableCompaction, compact
from spark_jobs.operate.watermark import Closing, close_by_hand, read_closing
from spark_jobs.steps import CRASH_VARIABLE
from spark_jobs.units import HourRange
from tests.spark_jobs.homes.held import Held
from tests.spark_jobs.ingest.test_continuous import Ingest

pytestmark = pytest.mark.homes

ROOT = Path(__file__).resolve().parents[3]
DAY = "2025-06-02"
FILES = 4


def at(hour: int) -> datetime:
    return datetime(2025, 6, 2, hour, tzinfo=UTC)


def traffic(number: int, hours: range, received_at: str | None = None) -> list[dict[str, Any]]:
    """Twelve events an hour, half of them clicks."""
    return [
        lake.event(
            f"e{number}-{hour}-{i}",
            event_time=f"{DAY}T{hour:02d}:{5 * i:02d}:00.000{number}37Z",
            received_at=received_at or f"{DAY}T{hour:02d}:{5 * i:02d}:02Z",
            event_type=("impression", "click")[i % 2],
            campaign_id=("c-cpm", "c-cpc")[i % 2],
            user_id=f"u{(number * i) % 7}",
            placement=(None, "top", "é")[i % 3],
        )
        for hour in hours
        for i in range(12)
    ]


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory, spark: SparkSession) -> Settings:
    """Hours 8 to 11 in FILES batches, with rejects and orders; the last event is of 11:55, so hours 8 and 9 are closed."""
    home = load_settings(home=tmp_path_factory.mktemp("compact") / "home", max_files_per_batch=1)
    lake.campaigns(home)
    for number in range(FILES):
        lake.land(home, f"events/eu/{number}.jsonl", [*traffic(number, range(8, 12)), {"bad": number}, *traffic(0, range(8, 9))])
        orders = [lake.order(f"o{number}", received_at=f"{DAY}T11:20:00Z"), lake.order("o0", status="cancelled")]
        lake.land(home, f"orders/eu/{number}.jsonl", orders)
    run_ingest(home, spark=spark)
    return home


@pytest.fixture
def home(ingested: Settings, tmp_path: Path) -> Settings:
    copy = load_settings(home=tmp_path / "copy", max_files_per_batch=1)
    shutil.copytree(ingested.home_path, copy.home_path, ignore=shutil.ignore_patterns("*.jsonl"))  # they are of another place
    return copy


def files(home: Settings, table: str, hour: int | None = None) -> list[str]:
    rows = pa.table(DeltaTable(home.table_uri(table)).get_add_actions(flatten=True)).to_pylist()
    return [row["path"] for row in rows if hour is None or row["partition.event_hour"] == hour]


def everything(home: Settings) -> dict[str, Any]:
    """All rows of the tables, whatever their order."""
    with Held(home) as held:
        return {table: sorted(map(repr, held.rows(table, "*"))) for table in TABLES if table != "campaigns"}


def parts(report: CompactReport) -> list[tuple[str, str | None]]:
    return [(part.table, part.partition) for part in report.tables]


def test_closed_hours_are_put_together_and_nothing_else_changes(spark: SparkSession, home: Settings) -> None:
    uri = home.table_uri("events")
    before, version, by_spark = everything(home), DeltaTable(uri).version(), lake.rows(spark, home, "events", lake.EVENT_COLUMNS)
    said: list[str] = []
    report = compact(home, None, progress=said.append)

    assert parts(report) == [("events", f"event_date={DAY}/event_hour={hour}") for hour in (8, 9, 10)]
    assert said == [f"{table} {partition}" for table, partition in parts(report)]
    assert [len(files(home, "events", hour)) for hour in (8, 9, 10, 11)] == [1, 1, 1, FILES]
    for part in report.tables:
        assert (part.files_before, part.files_after, part.rows) == (FILES, 1, 12 * FILES)
        assert part.bytes_after < part.bytes_before
        assert part.version_after == part.version_before + 1 > version
        commit = DeltaLog(uri).commit(part.version_after)
        assert commit is not None
        assert not commit.changes_rows
        assert (len(commit.added), len(commit.removed)) == (1, FILES)
        assert commit.user_metadata is None
        assert len(part.content_hash) == 32
    assert len({part.content_hash for part in report.tables}) == 3
    assert everything(home) == before
    assert lake.rows(spark, home, "events", lake.EVENT_COLUMNS) == by_spark
    with Held(home) as held:  # a reader that has pinned the version before
        pinned = held._database.execute(f"select count(*) from delta_scan('{uri}', version = {version})").fetchall()
    assert pinned == [(4 * 12 * FILES,)]
    # times are kept with bounds that do not cut off what lies behind the millisecond
    with Held(home) as held:
        assert held.rows("events", "count(*) filter (event_time > '2025-06-02 08:55:00.000250+00')")[0][0] > 0
        path = f"delta_scan('{uri}') where event_time > '2025-06-02 10:55:00.000250+00' and event_hour = 10"
        assert held._database.execute(f"select count(*) from {path}").fetchall() == [(1,)]
    frame = spark.read.format("delta").load(uri)
    assert frame.where("event_time > '2025-06-02T10:55:00.000250Z' and event_hour = 10").count() == 1

    assert not compact(home, None).tables
    assert DeltaTable(uri).version() == version + 3


def test_the_hash_sees_every_column_and_not_the_order(home: Settings) -> None:
    tables = Lake(home)
    uri = home.table_uri("events")
    hour = (("event_date", DAY), ("event_hour", "8"))

    def content() -> tuple[int, str]:
        with tables.database() as database:
            return module.content_of(database, tables.pin(EVENTS), EVENTS, hour)

    before = content()
    assert before[0] == 12 * FILES
    table = DeltaTable(uri).to_pyarrow_table()
    write_deltalake(uri, table.take(list(range(table.num_rows - 1, -1, -1))), mode="overwrite")
    assert content() == before
    for name in table.column_names:
        if name in ("event_date", "event_hour"):
            continue
        changed = DeltaTable(uri)
        value = "null" if table[name].null_count < table.num_rows else "true" if name == "is_late" else "'x'"
        changed.update(updates={name: value}, predicate="event_id = 'e1-8-1'")
        assert content() != before, name
        changed.restore(changed.version() - 1)
        assert content() == before


def test_a_range_is_kept_to_and_an_open_hour_refused(home: Settings) -> None:
    assert parts(compact(home, HourRange.of(at(9)))) == [("events", f"event_date={DAY}/event_hour=9")]
    version = DeltaTable(home.table_uri("events")).version()
    with pytest.raises(UsageError, match="2025-06-02T11Z is not closed"):
        compact(home, HourRange(at(8), at(12)))
    assert DeltaTable(home.table_uri("events")).version() == version
    assert compact(load_settings(home=home.home_path / "nowhere"), None).tables == []


def test_late_rows_wait_until_they_are_many(spark: SparkSession, home: Settings) -> None:
    """Of a large hour; in a small one any late row is a tenth of it."""
    compact(home, None)
    big = pa.table(DeltaTable(home.table_uri("events")).get_add_actions(flatten=True)).to_pylist()
    assert all(row["size_bytes"] < 100_000 for row in big)

    def file(path: str, size: int) -> TableFile:
        return TableFile(path, size, None, {}, {}, {})

    large = [file("part-c000.zstd.parquet", 90_000_000)]

    def late(count: int, size: int) -> list[TableFile]:
        return [file(f"part-{n}.snappy.parquet", size) for n in range(count)]

    assert not module._has_loose_rows(large)
    assert not module._has_loose_rows(late(1, 1000))
    assert module._has_loose_rows(late(2, 1000))
    assert not module._has_loose_rows([*large, *late(LATE_FILES - 1, 1000)])
    assert module._has_loose_rows([*large, *late(LATE_FILES, 1000)])
    assert module._has_loose_rows([*large, *late(1, 11_000_000)])

    lake.land(home, "events/eu/late.jsonl", traffic(5, range(8, 9), received_at=f"{DAY}T11:00:00Z"))
    run_ingest(home, spark=spark)
    assert len(files(home, "events", 8)) == 2
    before = everything(home)
    assert parts(compact(home, None)) == [("events", f"event_date={DAY}/event_hour=8")]
    assert len(files(home, "events", 8)) == 1
    assert everything(home) == before
    assert not compact(home, None).tables


def test_the_other_tables_are_put_together_when_their_files_are_many(home: Settings) -> None:
    before = everything(home)
    appended = {"batch_ledger": 0, "rejected_events": 0, "minute_metrics": 0}
    for table in appended:
        uri = home.table_uri(table)
        empty = DeltaTable(uri).to_pyarrow_table().slice(0, 1)
        for _ in range(LOOSE_FILES):
            write_deltalake(uri, empty, mode="append")
        appended[table] = len(files(home, table))
    grown = everything(home)
    report = compact(home, None)
    others = [part for part in report.tables if part.table != "events"]
    assert {part.table for part in others} == set(appended)
    assert all((part.files_before, part.files_after) == (appended[part.table], 1) for part in others)
    assert all(len(files(home, table)) == 1 for table in appended)
    after = everything(home)
    assert after == grown != before
    assert not compact(home, None).tables


def test_a_day_that_is_over_becomes_one_file(home: Settings) -> None:
    assert len(files(home, "minute_metrics")) == FILES
    assert ("minute_metrics", f"event_date={DAY}") not in parts(compact(home, None))
    close_by_hand(home, at(0) + timedelta(days=1), reason="over", closed_by="tests")
    in_two_days = datetime.now(UTC) + timedelta(days=2)
    report = compact(home, None, now=in_two_days)
    assert ("minute_metrics", f"event_date={DAY}") in parts(report)
    assert "rejected_events" in {part.table for part in report.tables}
    assert len(files(home, "minute_metrics")) == len(files(home, "rejected_events")) == 1
    assert not compact(home, None, now=in_two_days).tables


def test_the_key_index_is_not_rebuilt(spark: SparkSession, home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_rebuild(*_: object) -> None:
        raise AssertionError("rebuilt")

    monkeypatch.setattr("spark_jobs.ingest.dedupe.index.KeyIndex.rebuild", no_rebuild)
    compact(home, None)
    lake.land(home, "events/eu/again.jsonl", [*traffic(0, range(8, 12)), *traffic(9, range(11, 12))])
    report = run_ingest(home, spark=spark)
    assert (report.accepted, report.duplicate, report.conflict) == (12, 48, 0)


def test_an_index_is_built_from_compacted_files(spark: SparkSession, home: Settings) -> None:
    compact(home, None)
    shutil.rmtree(home.key_index_path)
    lake.land(home, "events/eu/again.jsonl", [*traffic(0, range(8, 12)), *traffic(9, range(11, 12))])
    report = run_ingest(home, spark=spark)
    assert (report.accepted, report.duplicate, report.conflict) == (12, 48, 0)


def test_a_rewrite_that_doubles_rows_is_found_and_taken_back(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody runs OPTIMIZE by hand at the same moment: Delta lets both commits pass."""
    uri = home.table_uri("events")
    before = everything(home)

    def beside(*args: Any, **options: Any) -> bool:
        DeltaTable(uri).optimize.compact(partition_filters=[("event_date", "=", DAY), ("event_hour", "=", "8")])
        write_deltalake(uri, DeltaTable(uri).to_pyarrow_table().slice(0, 0), mode="append")  # and an ingest goes on
        return rearrange(*args, **options)

    monkeypatch.setattr(module, "rearrange", beside)
    with pytest.raises(TableCorruptionError, match=r"holds 96 rows .* held 48 .* restore version"):
        compact(home, None)
    assert everything(home) == before
    monkeypatch.undo()
    assert len(compact(home, None).tables) == 2  # hour 8 is compacted: by the other one
    assert everything(home) == before


def test_one_rewrites_at_a_time(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECONDS, Patience.SOME, 0.1)
    with exclusive(home, REWRITE), pytest.raises(BusyError, match=r"rewrite\.lock"):
        compact(home, None)
    assert len(files(home, "events", 8)) == FILES
    reports: list[CompactReport] = []
    monkeypatch.undo()
    together = [threading.Thread(target=lambda: reports.append(compact(home, None))) for _ in range(3)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert sorted(name for report in reports for name in parts(report)) == sorted(
        ("events", f"event_date={DAY}/event_hour={hour}") for hour in (8, 9, 10)
    )


def _merged_meanwhile(home: Settings, monkeypatch: pytest.MonkeyPatch, times: int) -> Callable[[], int]:
    """A batch of orders is merged between the snapshot and the commit of a compaction, so many times."""
    one = DeltaTable(home.table_uri("orders")).to_pyarrow_table().cast(ORDERS.schema).slice(0, 1)
    for number in range(3):  # orders that no later record touches: a file each
        new = pa.Table.from_pylist([{**one.to_pylist()[0], "order_id": f"new{number}"}], ORDERS.schema)
        merge_orders(new, home, Transaction("new", number), {})
    done = 0

    def beside(*args: Any, **options: Any) -> bool:
        nonlocal done
        if done < times:
            done += 1
            merge_orders(one, home, Transaction("beside", done), {})
        return rearrange(*args, **options)

    monkeypatch.setattr(module, "rearrange", beside)
    monkeypatch.setattr(module, "LOOSE_FILES", -1)
    monkeypatch.setattr(module, "_LEFT_ALONE", tuple(name for name in TABLES if name != "orders"))
    return lambda: done


def test_a_merge_that_comes_between_is_waited_for(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    count = _merged_meanwhile(home, monkeypatch, 2)
    before = everything(home)
    assert parts(compact(home, None)) == [("orders", None)]
    assert count() == 2
    assert everything(home) == before


def test_a_table_that_never_holds_still_is_left_as_it_is(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spark_jobs.operate.compact.time.sleep", lambda _: None)
    _merged_meanwhile(home, monkeypatch, 10**6)
    with pytest.raises(BusyError, match="table orders was changed"):
        compact(home, None)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_compaction_loses_nothing(home: Settings, moment: str) -> None:
    before = everything(home)
    script = "from spark_jobs.config import load_settings as s; from spark_jobs.operate.compact import compact; compact(s(), None)"
    environment = {"ADTALLY_HOME": str(home.home_path), CRASH_VARIABLE: f"{moment}:compaction:0"}
    assert run_code(script, **environment) == -signal.SIGKILL
    assert everything(home) == before
    assert len(compact(home, None).tables) == (3 if moment == "before" else 2)
    assert everything(home) == before
    assert [len(files(home, "events", hour)) for hour in (8, 9, 10)] == [1, 1, 1]


def test_beside_a_live_ingest_neither_fails(spark: SparkSession, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """All hours count as closed here, also those that are written to, and any two files are put together."""
    home = settings
    everything_closed = Closing(closed_through=at(23))
    monkeypatch.setattr(module, "read_closing", lambda _: everything_closed)
    monkeypatch.setattr(module, "LOOSE_FILES", 0)
    monkeypatch.setattr(module, "LATE_FILES", 1)
    lake.campaigns(home)
    batches = 8
    made: list[TableCompaction] = []
    lake.land(home, "events/eu/first.jsonl", traffic(9, range(8, 12)))
    with Ingest(home) as ingest:
        ingest.wait_for("first batch", lambda: len(ingest.batches()) > 0)
        for number in range(batches):
            lake.land(home, f"events/eu/{number}.jsonl", [*traffic(number, range(8, 12)), *traffic(9, range(8, 9)), {"bad": 1}])
            cancelled = [lake.order(f"o{number - 2}", status="cancelled")] if number % 3 == 2 else []
            lake.land(home, f"orders/eu/{number}.jsonl", [lake.order(f"o{number}"), *cancelled])
            meanwhile: list[TableCompaction] = []
            end = time.monotonic() + 60
            while not any(part.table == "events" for part in meanwhile) and time.monotonic() < end:
                meanwhile += compact(home, None).tables  # on and on, until the batch is there and after it
            made += meanwhile
        ingest.wait_for("all batches", lambda: sum(b["offered"] for b in ingest.batches()) >= 48 + batches * 62 + batches // 3)
        assert ingest.terminate() == 0, ingest.errors
        assert "Traceback" not in ingest.errors
    made += compact(home, None).tables
    assert {"events", "minute_metrics", "batch_ledger", "rejected_events", "orders"} <= {part.table for part in made}
    assert len([part for part in made if part.table == "events"]) >= batches

    total = lake.ledger(spark, home)
    assert (total["offered"], total["accepted"]) == (48 + batches * 61, 48 * (batches + 1))
    assert (total["duplicate"], total["rejected"]) == (12 * batches, batches)
    calm = load_settings(home=home.home_path / "calm")  # the same files, ingested without compaction
    shutil.copytree(home.landing_path, calm.landing_path)
    run_ingest(calm, spark=spark)
    assert lake.everything(spark, home) == lake.everything(spark, calm)
    assert read_closing(home).first_hour == at(8)
