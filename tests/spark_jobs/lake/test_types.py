"""A home whose tables hold sums of money as BIGINT, as an older adtally made them, goes on with sums of 128 bits."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, Schema
from killed import run_code

from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.data_files import DataFileWriter
from spark_jobs.lake.duck import connect_delta
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import BATCH_LEDGER, BILLING_LINES, MINUTE_METRICS, TABLES, Table
from spark_jobs.lake.writes import DeltaSink, ensure_tables
from spark_jobs.publish.messages import MetricsMessages
from spark_jobs.steps import CRASH_VARIABLE, Step

HUGE = 2**70
OLD = [table for table in TABLES.values() if "DECIMAL(38,0)" in table.types.values()]
WROTE = Transaction("query", 7)


def row(table: Table, number: int, amount: int) -> dict[str, Any]:
    """A row with ``amount`` wherever money is."""
    day = datetime(2025, 6, number, 10, tzinfo=UTC)
    values: dict[pa.DataType, Any] = {
        pa.string(): f"it's {number} %",
        pa.int64(): number,
        pa.date32(): day.date(),
        pa.timestamp("us", "UTC"): day,
        pa.decimal128(38, 0): amount,
        pa.bool_(): True,
    }
    return {field.name: values[field.type] for field in table.schema}


def make_old(settings: Settings, table: Table) -> None:
    """The table with BIGINT for DECIMAL(38,0), and two commits of rows."""
    schema = pa.schema([pa.field(f.name, pa.int64() if pa.types.is_decimal(f.type) else f.type) for f in table.schema])
    uri = settings.table_uri(table.name)
    DeltaTable.create(uri, Schema.from_arrow(schema), partition_by=list(table.partition_by))
    old = replace(table, columns=table.columns.replace("DECIMAL(38,0)", "BIGINT"), stats_columns=())
    for number in (1, 2):
        with DataFileWriter(uri, old) as writer:
            writer.write(pa.Table.from_pylist([row(table, number, 5 * number)], schema))
        DeltaSink(old, settings).append(writer.files, Step.MINUTE_METRICS, Transaction("query", 5 + number))


def contents(settings: Settings, table: Table, version: int | None = None) -> list[tuple[Any, ...]]:
    at = "" if version is None else f", version = {version}"
    with connect_delta() as lake:
        lake.execute("set timezone = 'UTC'")
        return sorted(lake.sql(f"from delta_scan('{settings.table_uri(table.name)}'{at})").fetchall(), key=repr)


@pytest.fixture
def old_home(tmp_path: Path) -> Settings:
    settings = load_settings(home=tmp_path / "home")
    for table in OLD:
        make_old(settings, table)
    return settings


def test_which_tables_hold_sums_of_money() -> None:
    assert {table.name for table in OLD} >= {MINUTE_METRICS.name, BATCH_LEDGER.name, BILLING_LINES.name, "restatements"}


def test_old_tables_get_the_new_types_and_keep_all_else(old_home: Settings) -> None:
    before = {table.name: contents(old_home, table) for table in OLD}
    messages = list(MetricsMessages(Lake(old_home)).whole(2, 0))
    ensure_tables(old_home)
    ensure_tables(old_home)
    for table in OLD:
        uri = old_home.table_uri(table.name)
        log = DeltaLog(uri)
        assert log.latest_version() == 3, "one commit, once"
        assert Schema.from_arrow(table.schema).fields == DeltaTable(uri).schema().fields
        assert contents(old_home, table) == before[table.name] == contents(old_home, table, version=2)
        commit = log.commit(3)
        assert commit is not None and commit.added and commit.removed
        assert not commit.changes_rows, "for whoever follows the log nothing has happened"
        assert DeltaTable(uri).transaction_version(WROTE.query_id) == WROTE.batch_id
    assert list(MetricsMessages(Lake(old_home)).whole(3, 0)) == [
        (keys, [value.replace('"version":2', '"version":3') for value in values]) for keys, values in messages
    ]


def test_a_home_with_new_types_holds_more_than_64_bits(old_home: Settings) -> None:
    ensure_tables(old_home)
    for table in OLD:
        sink = DeltaSink(table, old_home)
        rows = pa.Table.from_pylist([row(table, 3, HUGE)], table.schema)
        sink.append_rows(rows, Step.MINUTE_METRICS, WROTE)  # seen, by the log from before
        assert len(contents(old_home, table)) == 2
        sink.append_rows(rows, Step.MINUTE_METRICS, Transaction("query", 8))
        money = next(name for name, kind in table.types.items() if kind == "DECIMAL(38,0)")
        assert sorted(Lake(old_home).rows(table, money)[money].to_pylist()) == [5, 10, HUGE]
    commit = DeltaLog(old_home.table_uri(MINUTE_METRICS.name)).commit(4)
    assert commit is not None
    _, values = next(MetricsMessages(Lake(old_home)).of_commit(commit))
    assert json.loads(values[0])["spend_nanos"] == HUGE


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_types_change(old_home: Settings, moment: str) -> None:
    before = contents(old_home, MINUTE_METRICS)
    code = f"""
        from spark_jobs.config import load_settings
        from spark_jobs.lake.writes import ensure_tables
        ensure_tables(load_settings(home={str(old_home.home_path)!r}))
    """
    assert run_code("\n".join(map(str.strip, code.splitlines())), **{CRASH_VARIABLE: f"{moment}:{Step.TYPES_CHANGED}:0"}) == -9
    ensure_tables(old_home)
    assert contents(old_home, MINUTE_METRICS) == before
    assert [len(contents(old_home, table)) for table in OLD] == [2] * len(OLD)
