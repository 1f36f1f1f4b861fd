"""Lake and Snapshot: tables at fixed versions, and commits that are made once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError

from expectations import lake as checks
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import TableCorruptionError
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.reading import TableFile
from spark_jobs.lake.scratch import scratch_folder
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, MINUTE_METRICS, RULE_SETS, Table
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.status import read_status
from spark_jobs.steps import Step

NOON = datetime(2025, 6, 2, 12, 0, 0, 123_456, UTC)


def rows(table: Table, *values: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([{**dict.fromkeys(table.schema.names), **value} for value in values], table.schema)


def event(name: str, hour: int) -> dict[str, Any]:
    at = NOON.replace(hour=hour)
    return {"event_id": name, "event_time": at, "event_date": at.date(), "event_hour": hour}


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    settings = load_settings(home=tmp_path / "it's home")  # a quote in every path
    ensure_tables(settings)
    made = Lake(settings)
    made.append(EVENTS, rows(EVENTS, event("a", 8), event("b", 9)), Step.EVENTS)
    made.append(EVENTS, rows(EVENTS, event("c", 9)), Step.EVENTS)
    return made


@pytest.mark.parametrize("way", ["scan", "attach", "checks"])
def test_no_query_chooses_files_while_it_runs(lake: Lake, way: str) -> None:
    """If such a query fails on an object store, DuckDB's reader of the log aborts the process."""
    snapshot = lake.pin(EVENTS)
    with lake.database() as database:
        database.execute("call enable_logging(level = 'info')")
        if way == "attach":
            read = snapshot.attach(database, EVENTS)
        else:
            read = snapshot.scan(EVENTS) if way == "scan" else checks.delta_scan(lake.uri(EVENTS), snapshot.version(EVENTS))
        assert database.execute(f"select event_id from {read} order by event_time desc limit 1").fetchall()
        database.execute(f"select * from {read} join (select 8::int as event_hour) using (event_hour)").fetchall()
        assert database.execute(f"select event_id from {read} where event_hour = 8").fetchall() == [("a",)]
        logged = database.execute("select message from duckdb_logs where type = 'delta.FilterPushdown'").fetchall()
    assert [message for (message,) in logged if "'type': dynamic" in message] == []
    assert any("'type': constant" in message for (message,) in logged)


def test_a_snapshot_stays_at_its_versions(lake: Lake) -> None:
    snapshot = lake.pin(BATCH_LEDGER, EVENTS)
    lake.append(EVENTS, rows(EVENTS, event("d", 10)), Step.EVENTS)
    assert snapshot.versions == {"batch_ledger": 0, "events": 2}
    assert sorted(snapshot.rows(EVENTS, "event_id")["event_id"].to_pylist()) == ["a", "b", "c"]
    assert sorted(lake.rows(EVENTS, "event_id")["event_id"].to_pylist()) == ["a", "b", "c", "d"]
    with lake.database(memory="200MB", threads=1) as database:
        found = [database.execute(f"select count(*) from {scan}").fetchall() for scan in (snapshot.scan(EVENTS), lake.scan(EVENTS))]
    assert found == [[(3,)], [(4,)]]
    later = lake.at({"events": 1}).and_pin(RULE_SETS)
    assert (later.version(EVENTS), later.version(RULE_SETS), MINUTE_METRICS in later) == (1, 0, False)
    with pytest.raises(KeyError):
        later.version(MINUTE_METRICS)


def test_tables_are_pinned_in_the_order_given(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = DeltaLog.latest_version

    def noted(log: DeltaLog) -> int | None:
        asked.append(log.uri.rsplit("/", 1)[-1])
        return real(log)

    monkeypatch.setattr(DeltaLog, "latest_version", noted)
    lake.pin(EVENTS, BATCH_LEDGER, MINUTE_METRICS)
    assert asked == ["events", "batch_ledger", "minute_metrics"]


def test_tables_that_do_not_exist(tmp_path: Path) -> None:
    nowhere = Lake(load_settings(home=tmp_path / "nowhere"))
    snapshot = nowhere.pin(EVENTS)
    assert (snapshot.versions, EVENTS in snapshot, nowhere.exists(EVENTS)) == ({}, False, False)
    assert (nowhere.table_id(EVENTS), nowhere.last_transaction(EVENTS, "q"), nowhere.has(EVENTS, Transaction("q", 0))) == (
        None,
        None,
        False,
    )
    assert snapshot.rows(EVENTS).schema == EVENTS.stored_schema
    assert nowhere.rows(EVENTS, "event_id").num_rows == 0
    assert not nowhere.settings.home_path.exists()


def test_rows_by_columns_files_and_values(lake: Lake) -> None:
    snapshot = lake.pin(EVENTS)
    assert snapshot.rows(EVENTS).schema.names == [n for n in EVENTS.schema.names if n not in ("event_date", "event_hour")]
    assert snapshot.rows(EVENTS, "event_id", where_in=("event_id", pa.array(["a", "x"])))["event_id"].to_pylist() == ["a"]
    partitions = snapshot.partitions(EVENTS)
    assert {key: sum(file.rows or 0 for file in files) for key, files in partitions.items()} == {
        (("event_date", "2025-06-02"), ("event_hour", "8")): 1,
        (("event_date", "2025-06-02"), ("event_hour", "9")): 2,
    }
    paths = [file.path for files in partitions.values() for file in files]
    assert sorted(snapshot.paths(EVENTS)) == sorted(paths)
    assert sorted(lake.read_files(EVENTS, paths, "event_id")["event_id"].to_pylist()) == ["a", "b", "c"]
    assert [batch.num_rows for batch in lake.read_batches(EVENTS, paths, "event_id")] == [1, 1, 1]
    whole = pa.concat_tables([part for file in snapshot.files(EVENTS) for part in lake.read_file_rows(EVENTS, file)])
    assert whole.schema == EVENTS.schema
    assert sorted(zip(whole["event_id"].to_pylist(), whole["event_hour"].to_pylist(), strict=True)) == [
        ("a", 8),
        ("b", 9),
        ("c", 9),
    ]
    with lake.database() as database:
        assert database.execute(f"select count(*) from {lake.scan_files(EVENTS, paths)}").fetchall() == [(3,)]
    Path(lake.uri(EVENTS), *paths[:1]).unlink()
    with pytest.raises(FileNotFoundError):
        lake.read_files(EVENTS, paths, "event_id")


@pytest.mark.parametrize(
    ("start", "end", "may"),
    [
        pytest.param(timedelta(0), timedelta(0), True, id="the moment itself"),
        pytest.param(timedelta(microseconds=-9), timedelta(microseconds=-1), True, id="before it within a millisecond"),
        pytest.param(timedelta(days=-1), timedelta(milliseconds=-1), False, id="before it"),
        pytest.param(timedelta(microseconds=1), timedelta(days=1), True, id="after it within a millisecond"),
        pytest.param(timedelta(milliseconds=2), timedelta(days=1), False, id="after it"),
    ],
)
def test_a_file_may_have_rows_of_a_time_by_its_statistics(lake: Lake, start: timedelta, end: timedelta, may: bool) -> None:
    (file,) = lake.pin(EVENTS).partitions(EVENTS)[(("event_date", "2025-06-02"), ("event_hour", "8"))]
    at = NOON.replace(hour=8)
    assert file.may_have("event_time", at + start, at + end) is may
    assert TableFile("p", 1, None, {}, {}, {}).may_have("event_time", at + start, at + end)


def test_a_transaction_is_committed_once(lake: Lake) -> None:
    row, first = rows(RULE_SETS, {"rule_set": "r"}), Transaction("app", 3)
    assert lake.append(RULE_SETS, row, Step.RULE_SETS, transaction=first, metadata={"why": "test"})
    for again in (first, Transaction("app", 2)):
        assert lake.has(RULE_SETS, again)
        assert not lake.append(RULE_SETS, row, Step.RULE_SETS, transaction=again)
    assert not lake.has(RULE_SETS, Transaction("app", 4)) and not lake.has(RULE_SETS, Transaction("other", 0))
    assert (lake.version(RULE_SETS), lake.last_transaction(RULE_SETS, "app")) == (1, 3)
    commit = lake.log(RULE_SETS).commit(1)
    assert commit is not None and (commit.txn, commit.metadata) == (("app", 3), {"why": "test"})


@pytest.mark.parametrize("conflict", ["the same files", "the same transaction"])
def test_a_commit_on_an_old_version_is_refused_if_it_contradicts(lake: Lake, conflict: str) -> None:
    base = lake.pin(EVENTS)
    (file,) = base.partitions(EVENTS)[(("event_date", "2025-06-02"), ("event_hour", "8"))]

    def commit(add: str) -> bool:
        with lake.writer(EVENTS) as writer:
            writer.write(rows(EVENTS, event(add, 8)))
        remove, transaction = ([file], None) if conflict == "the same files" else ([], Transaction("app", 1))
        return lake.commit(EVENTS, Step.EVENTS, base=base.version(EVENTS), add=writer.files, remove=remove, transaction=transaction)

    assert commit("first")
    with pytest.raises(CommitFailedError):
        commit("second")
    ids = set(lake.rows(EVENTS, "event_id")["event_id"].to_pylist())
    assert ids == ({"b", "c", "first"} if conflict == "the same files" else {"a", "b", "c", "first"})


def test_replace(lake: Lake) -> None:
    for name in ("old", "new"):
        lake.replace(RULE_SETS, rows(RULE_SETS, {"rule_set": name}), Step.RULE_SETS, metadata={"name": name})
    assert lake.rows(RULE_SETS)["rule_set"].to_pylist() == ["new"]
    assert lake.log(RULE_SETS).newest_metadata() == {"name": "new"}


def test_a_table_that_is_created_again_has_another_id(lake: Lake) -> None:
    before = lake.table_id(EVENTS)
    assert before == str(DeltaTable(lake.uri(EVENTS)).metadata().id)
    os.rename(lake.uri(EVENTS), lake.uri(EVENTS) + ".old")
    assert lake.table_id(EVENTS) is None
    ensure_tables(lake.settings)
    assert lake.table_id(EVENTS) not in (None, before)


def test_versions_that_cannot_be_read(lake: Lake) -> None:
    assert [lake.is_readable(EVENTS, version) for version in (0, 2, 3)] == [True, True, False]
    with pytest.raises(TableCorruptionError, match="version 3 of table events cannot be read"):
        lake.at({"events": 3}).files(EVENTS)
    message = r"the tables of .*lakehouse cannot be read: .*adtally fsck"
    with pytest.raises(TableCorruptionError, match=message), lake.database() as database:
        database.execute(f"select * from {lake.scan(EVENTS, 3)}")


def _read_only(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("a file where the folder should be")


@pytest.mark.parametrize("spoil", [None, _read_only], ids=["writable", "not writable"])
def test_scratch_is_gone_afterwards(tmp_path: Path, spoil: Callable[[Path], None] | None) -> None:
    settings: Settings = load_settings(home=tmp_path / "home")
    if spoil is not None:
        spoil(settings.scratch_path)
    with scratch_folder(settings, "test-") as folder:
        assert folder.is_dir() and folder.name.startswith("test-")
        assert (folder.parent == settings.scratch_path) is (spoil is None)
    assert not folder.exists()


def test_files_of_some_partitions(lake: Lake) -> None:
    snapshot = lake.pin(EVENTS, MINUTE_METRICS)
    of_nine = [file.path for file in snapshot.files(EVENTS) if file.values["event_hour"] == 9]
    day, hour = ("event_date", ["2025-06-02"]), ("event_hour", {"9"})
    assert len(of_nine) == 2
    assert [file.path for file in snapshot.files(EVENTS, day, hour)] == of_nine
    assert sorted(snapshot.paths_in(EVENTS, {(NOON.date(), 9), (NOON.date(), 10)})) == sorted(of_nine)
    assert list(snapshot.partitions(EVENTS, hour)) == [(("event_date", "2025-06-02"), ("event_hour", "9"))]
    assert snapshot.files(EVENTS, ("event_date", ["2025-06-03"])) == snapshot.files(MINUTE_METRICS, day) == []


def test_rows_are_counted_by_the_statistics_unless_a_file_has_none(lake: Lake) -> None:
    assert (lake.pin(EVENTS).size(EVENTS).files, lake.pin(EVENTS).size(EVENTS).rows) == (3, 3)
    with lake.writer(EVENTS) as writer:
        writer.write(rows(EVENTS, event("d", 10)))
    (file,) = writer.files
    lake.commit(EVENTS, Step.EVENTS, add=[replace(file, stats="{}")])
    assert lake.pin(EVENTS).size(EVENTS).rows is None
    counted = {table.name: table.rows for table in read_status(lake.settings).tables}
    assert (counted["events"], counted["orders"]) == (4, 0)
