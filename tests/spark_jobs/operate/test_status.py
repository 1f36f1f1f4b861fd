"""The report of a home that is whole, and of copies of it that were broken by hand, each in one way."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import lake
import pytest
from delta.tables import DeltaTable
from local import LocalEvents
from pyspark.sql import Row, SparkSession

from orchestration.ledger import Ledger
from services.simulator import simulate
from services.simulator.truth import Truth
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import TableCorruptionError
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import TABLES
from spark_jobs.operate import status as module
from spark_jobs.operate.status import NOTHING_INGESTED, Status, read_status

pytestmark = pytest.mark.homes

Break = Callable[[str], DeltaTable]


@pytest.fixture(scope="module")
def made(spark: SparkSession, empty_lakehouse: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Truth]:
    """A home of three batches of events and one of orders; a file of each fault landed in it."""
    settings = load_settings(home=tmp_path_factory.mktemp("a 'quoted' home"), max_files_per_batch=5)
    shutil.copytree(empty_lakehouse, settings.lakehouse_uri)
    truth = simulate(settings.landing_path, 5_000, seed=11, days=0.5, conversion=0.5)
    run_ingest(settings, spark=spark)
    return settings, truth


@pytest.fixture
def home(made: tuple[Settings, Truth], tmp_path: Path) -> Settings:
    """A copy of it to break."""
    shutil.copytree(made[0].home_path, tmp_path / "home")
    return load_settings(home=tmp_path / "home", max_files_per_batch=5)


@pytest.fixture
def table(spark: SparkSession, home: Settings) -> Break:
    return lambda name: DeltaTable.forPath(spark, home.table_uri(name))


def _pick(table: DeltaTable, where: str = "true", order: str = "_batch_id, event_hour") -> Row:
    found = table.toDF().where(where).orderBy(*order.split(", ")).first()
    assert found is not None
    return found


def _place(row: Row, time: str, stream: str = "events") -> str:
    return f"batch {row['_batch_id']} of {stream}, {row['region']}, hour {row[time]:%Y-%m-%dT%HZ}: "


def _append(table: DeltaTable, row: Row, settings: Settings, name: str) -> None:
    spark = table.toDF().sparkSession
    spark.createDataFrame([row], table.toDF().schema).write.format("delta").mode("append").save(settings.table_uri(name))


def _broken(settings: Settings) -> list[str]:
    found = read_status(settings)
    assert not found.conservation_holds
    return found.problems


def test_a_whole_home_holds(made: tuple[Settings, Truth], spark: SparkSession) -> None:
    settings, _ = made
    found = read_status(settings)
    assert (found.conservation_holds, found.problems) == (True, [])
    for stream in ("events", "orders"):
        total = lake.ledger(spark, settings, stream)
        for name in ("offered", "accepted", "duplicate", "conflict", "rejected", "late"):
            assert sum(getattr(s, name) for s in found.sources if s.stream == stream) == total[name]
    assert [(s.stream, s.region) for s in found.sources] == sorted((s.stream, s.region) for s in found.sources)
    newest = spark.read.format("delta").load(settings.table_uri("batch_ledger"))
    for source in found.sources:
        rows = newest.where(f"stream = '{source.stream}' and region = '{source.region}'").collect()
        assert source.last_batch_id == max(row["_batch_id"] for row in rows)
        assert source.last_ingested_at is not None and source.lag_seconds is not None
        assert source.last_ingested_at.timestamp() == max(row["ingested_at"] for row in rows).timestamp()
        assert source.clock_ahead_seconds == 0
        received = max(row["max_received_at"] for row in rows if row["max_received_at"])
        assert source.lag_seconds == pytest.approx(source.last_ingested_at.timestamp() - received.timestamp())


def test_a_clock_that_is_ahead_gives_no_negative_lag(spark: SparkSession, settings: Settings) -> None:
    lake.campaigns(settings)
    LocalEvents(settings).take([lake.event("a"), lake.event("b", received_at="2099-01-01T00:00:00Z")])
    [source] = read_status(settings).sources
    assert source.lag_seconds == 0
    assert source.last_ingested_at is not None
    received = datetime(2099, 1, 1, tzinfo=UTC)
    assert source.clock_ahead_seconds == pytest.approx((received - source.last_ingested_at).total_seconds())
    with Ledger.open(settings) as ledger:
        version = DeltaLog(settings.table_uri("batch_ledger")).latest_version()
        assert version is not None
        assert [cell.lag_seconds for cell in ledger.added(-1, version)] == [0]


def test_the_sizes_of_the_tables_are_those_of_the_log(made: tuple[Settings, Truth], spark: SparkSession) -> None:
    settings, _ = made
    found = {table.name: table for table in read_status(settings).tables}
    assert list(found) == list(TABLES)
    for name, table in found.items():
        path = settings.table_uri(name)
        detail = spark.sql(f"describe detail delta.`{path}`").first()
        assert detail is not None
        version = spark.sql(f"describe history delta.`{path}`").agg({"version": "max"}).first()
        assert version is not None
        rows = spark.read.format("delta").load(path).count()
        assert (table.version, table.rows, table.files, table.bytes) == (
            version[0],
            rows,
            detail["numFiles"],
            detail["sizeInBytes"],
        )


def test_a_deleted_event(home: Settings, table: Break) -> None:
    row = _pick(table("events"), "spend_nanos > 0", "_batch_id, event_id")
    table("events").delete(f"event_id = '{row['event_id']}'")
    problems = _broken(home)
    assert len(problems) == 2
    assert problems[0].startswith(_place(row, "event_time") + "accepted is ")
    booked, held, counted = _numbers(problems[0], "batch_ledger", "events", "minute_metrics")
    assert booked == counted == held + 1
    booked, held, counted = _numbers(problems[1], "batch_ledger", "events", "minute_metrics")
    assert "spend_nanos is" in problems[1]
    assert booked == counted == held + row["spend_nanos"]


def _numbers(problem: str, *tables: str) -> list[int]:
    words = problem.replace(",", "").split()
    return [int(words[words.index(name, words.index("is")) - 2]) for name in tables]


def test_a_duplicated_event(home: Settings, table: Break) -> None:
    row = _pick(table("events"), "spend_nanos = 0", "_batch_id, event_id")
    _append(table("events"), row, home, "events")
    problems = _broken(home)
    assert [p for p in problems if "stand more than once" in p] == [
        f"batch {row['_batch_id']} of events: ids that stand more than once in events: 1, such as {row['event_id']}"
    ]
    assert len(problems) == 2 and problems[0].startswith(_place(row, "event_time") + "accepted is ")


def test_ids_are_compared_in_passes(home: Settings, table: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDS_PER_PASS", 700)
    assert read_status(home).conservation_holds
    # the law of sums would not see this one: one event's id is replaced by another's of its batch
    kept = _pick(table("events"), order="event_id")
    lost = table("events").toDF().orderBy("event_id", ascending=False).first()
    assert lost is not None
    table("events").update(f"event_id = '{lost['event_id']}'", {"event_id": f"'{kept['event_id']}'"})
    (problem,) = _broken(home)
    assert problem.endswith(f"ids that stand more than once in events: 1, such as {kept['event_id']}")


def test_a_lost_increment(home: Settings, table: Break) -> None:
    row = _pick(table("minute_metrics"), "spend_nanos = 0", "_batch_id, record_uuid")
    table("minute_metrics").delete(f"record_uuid = '{row['record_uuid']}'")
    (problem,) = _broken(home)
    assert problem.startswith(_place(row, "event_minute") + "accepted is ")
    booked, held, counted = _numbers(problem, "batch_ledger", "events", "minute_metrics")
    assert booked == held == counted + row["impressions"] + row["clicks"]


def test_money_in_an_increment(home: Settings, table: Break) -> None:
    row = _pick(table("minute_metrics"), "spend_nanos > 0", "_batch_id, record_uuid")
    table("minute_metrics").update(f"record_uuid = '{row['record_uuid']}'", {"spend_nanos": "spend_nanos + 1"})
    (problem,) = _broken(home)
    assert problem.startswith(_place(row, "event_minute") + "spend_nanos is ")
    booked, held, counted = _numbers(problem, "batch_ledger", "events", "minute_metrics")
    assert booked == held == counted - 1


@pytest.mark.parametrize("stream", ["events", "orders"])
def test_an_edited_ledger(home: Settings, table: Break, stream: str) -> None:
    row = _pick(table("batch_ledger"), f"stream = '{stream}' and accepted > 0 and event_hour is not null")
    where = f"stream = '{stream}' and _batch_id = {row['_batch_id']} and region = '{row['region']}' and event_hour = "
    where += f"timestamp_micros({int(row['event_hour'].timestamp()) * 1_000_000})"
    table("batch_ledger").update(where, {"accepted": "accepted + 1"})
    problems = _broken(home)
    place = _place(row, "event_hour", stream)
    counts = (
        f"{row['accepted'] + 1} accepted + {row['duplicate']} duplicate + {row['conflict']} conflict + {row['rejected']} rejected"
    )
    assert problems[0] == f"{place}{row['offered']} offered, but {counts}"
    if stream == "events":
        held = f"{row['accepted']} in events, {row['accepted']} in minute_metrics"
        assert problems[1:] == [f"{place}accepted is {row['accepted'] + 1} in batch_ledger, {held}"]
    else:
        assert len(problems) == 2 and problems[1].startswith("orders of all batches: accepted is ")
    # balanced within itself, but with nothing behind it
    table("batch_ledger").update(where, {"offered": "offered + 1"})
    assert _broken(home) == problems[1:]


def test_a_ledger_row_twice(home: Settings, table: Break) -> None:
    row = _pick(table("batch_ledger"), "stream = 'events' and duplicate > 0 and accepted = 0 and conflict = 0 and rejected = 0")
    _append(table("batch_ledger"), row, home, "batch_ledger")
    assert _broken(home) == [_place(row, "event_hour") + "2 rows in batch_ledger instead of one"]


@pytest.mark.parametrize(
    ("name", "outcome"), [("rejected_events", "rejected"), ("rejected_events", "conflict"), ("rejected_orders", "conflict")]
)
def test_a_lost_reject(home: Settings, table: Break, name: str, outcome: str) -> None:
    stream = name.removeprefix("rejected_")
    row = _pick(table(name), f"outcome = '{outcome}' and record_time is not null", "_batch_id, source_file, source_line")
    table(name).delete(f"source_file = '{row['source_file']}' and source_line = {row['source_line']}")
    (problem,) = _broken(home)
    assert problem.startswith(_place(row, "record_time", stream) + f"{outcome} is ")
    booked, kept = _numbers(problem, "batch_ledger", name)
    assert booked == kept + 1


def test_a_lost_order(home: Settings, table: Break) -> None:
    row = _pick(table("orders"), "has_placed and cancelled_at is not null", "order_id")
    table("orders").delete(f"order_id = '{row['order_id']}'")
    (problem,) = _broken(home)
    booked, held = _numbers(problem, "batch_ledger", "orders")
    assert problem.startswith("orders of all batches: ") and booked == held + 2


def test_the_newest_batch_may_be_incomplete_as_long_as_it_can_be_finished(
    spark: SparkSession, home: Settings, table: Break
) -> None:
    for stream in ("events", "orders"):
        last = table("batch_ledger").toDF().where(f"stream = '{stream}'").agg({"_batch_id": "max"}).first()
        assert last is not None
        table("batch_ledger").delete(f"stream = '{stream}' and _batch_id = {last[0]}")
        found = read_status(home)
        assert found.conservation_holds
        assert f"batch {last[0]} of {stream} is incomplete; it will be finished by the next ingest" in found.problems
    # after the loss of the checkpoint its records come again under another query, as duplicates
    shutil.rmtree(home.checkpoints_path / "events")
    assert [p for p in _broken(home) if "of events" in p] == [
        "batch 2 of events is incomplete, and its checkpoint is gone: no ingest will finish it"
    ]


def test_an_older_batch_without_ledger(home: Settings, table: Break) -> None:
    table("batch_ledger").delete("stream = 'events' and _batch_id = 0")
    (problem,) = _broken(home)
    assert problem.startswith("batch 0 of events: ") and problem.endswith(" rows in the tables, but none in batch_ledger")


def test_a_batch_that_ends_meanwhile_is_no_problem(home: Settings, table: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger was read before two batches ended, the other tables after it."""
    before = {table.name: table.version for table in read_status(home).tables}["batch_ledger"]
    ledger = table("batch_ledger").toDF().where("stream = 'events'").orderBy("_batch_id").collect()
    assert {row["_batch_id"] for row in ledger} == {0, 1, 2}
    versions = iter([before - 2])
    real = DeltaLog.latest_version

    def stale(log: DeltaLog) -> int | None:
        return next(versions, None) or real(log) if log.uri.endswith("batch_ledger") else real(log)

    monkeypatch.setattr(DeltaLog, "latest_version", stale)
    found = read_status(home)
    assert {table.name: table.version for table in found.tables}["batch_ledger"] == before - 2
    assert (found.conservation_holds, found.problems) == (True, [])


def test_many_problems_are_counted_and_queries_told_apart(spark: SparkSession, home: Settings, table: Break) -> None:
    query = json.loads((home.checkpoints_path / "events" / "metadata").read_text("utf-8"))["id"]
    shutil.rmtree(home.checkpoints_path)
    run_ingest(home, spark=spark)
    assert read_status(home).problems == []
    table("events").update(f"_query_id = '{query}'", {"spend_nanos": "spend_nanos + 1"})
    problems = _broken(home)
    assert len(problems) == 21 and problems[-1].endswith(" more contradictions")
    assert all(f"of events (query {query[:8]}), " in problem for problem in problems[:-1])


def test_unreadable_files_are_named(spark: SparkSession, settings: Settings) -> None:
    whole = gzip.compress(lake.lines(lake.event(f"g{i}") for i in range(200)))
    lake.land(settings, "events/eu/cut.jsonl.gz", whole[: len(whole) * 2 // 3])
    lake.land(settings, "events/eu/good.jsonl", [lake.event("good"), lake.event("bad", price_micros=-1)])
    lake.land(settings, "orders/eu/empty.jsonl.gz", b"")
    run_ingest(settings, spark=spark)
    found = read_status(settings)
    assert {(f.source_file, *f.reason_codes) for f in found.quarantined_files} == {
        ("events/eu/cut.jsonl.gz", "truncated_gzip"),
        ("orders/eu/empty.jsonl.gz", "empty_gzip"),
    }
    assert all(f.ingested_at.tzinfo is not None for f in found.quarantined_files)
    assert (found.conservation_holds, found.problems) == (True, [])


def test_records_of_any_time_and_compaction_keep_the_law(spark: SparkSession, settings: Settings) -> None:
    times = ["0001-01-01T00:30:00Z", "1582-10-10T12:00:00Z", "1900-01-01T00:00:00Z", "1969-12-31T23:59:59.999999Z"]
    times += ["1970-01-01T00:00:00Z", "2261-12-31T23:59:59Z", "9999-12-31T23:59:59.999999Z", "never"]
    odd = [lake.event(f"e{i}", event_time=time) for i, time in enumerate(times)]
    lake.land(settings, "events/eu/1.jsonl", [lake.event("good"), *odd])
    lake.land(settings, "events/eu/2.jsonl", [lake.event("good", price_micros=1), lake.event("other")])
    lake.land(settings, "events/eu/3.jsonl", b"")
    assert run_ingest(settings, spark=spark).rejected == len(times)
    assert read_status(settings).problems == []
    spark.sql(f"optimize delta.`{settings.table_uri('events')}`")
    found = read_status(settings)
    assert (found.conservation_holds, found.problems) == (True, [])
    assert {(table.rows, table.files) for table in found.tables if table.name == "events"} == {(2, 1)}


def test_nothing_ingested_yet(tmp_path: Path, settings: Settings) -> None:
    nowhere = load_settings(home=tmp_path / "nowhere")
    assert read_status(nowhere) == Status(problems=[NOTHING_INGESTED])
    assert not nowhere.home_path.exists()
    found = read_status(settings)
    assert (found.sources, found.conservation_holds, found.problems) == ([], True, [NOTHING_INGESTED])
    assert {table.rows for table in found.tables} == {0}
    shutil.rmtree(settings.table_uri("orders"))
    assert read_status(settings).problems == [NOTHING_INGESTED]


def test_lost_tables_and_lost_files(home: Settings) -> None:
    (file,) = [entry.path for entry in os.scandir(home.table_uri("orders")) if entry.name.endswith(".parquet")]
    Path(file).unlink()
    with pytest.raises(TableCorruptionError, match="cannot be read"):
        read_status(home, check_all=True)
    shutil.rmtree(home.table_uri("minute_metrics"))
    shutil.rmtree(home.table_uri("orders"))
    missing, *lost = reversed(_broken(home))
    assert [*lost[:1], missing] == [f"table {name} is missing, but others hold rows" for name in ("minute_metrics", "orders")]
    assert [problem.split(" that ")[0] for problem in lost[1:]] == ["orders: no batch has taken 4 files"]  # the plans went with it
