"""Torn last commits of every table: set aside by whoever writes next, refused in one line by whoever reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from spark_jobs.audit.plans import read_plans
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import TableCorruptionError
from spark_jobs.ingest.dedupe.index import KeyIndex
from spark_jobs.ingest.dedupe.keys import keys_of_ids
from spark_jobs.ingest.events import bring_index_to
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.data_files import DataFileWriter
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.rewrite import rearrange
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, ORDERS, TABLES, Table
from spark_jobs.lake.torn import mend_tables
from spark_jobs.lake.writes import DeltaSink, ensure_tables, merge_orders
from spark_jobs.steps import Step

_LIMITS = ("ingested_us", "earliest_us", "future_skew_us", "hour_grace_us")


def _row(table: Table, **values: Any) -> pa.Table:
    return pa.Table.from_pylist([{**dict.fromkeys(table.schema.names), **values}], table.schema)


def _append(settings: Settings, table: Table, batch: int, **values: Any) -> None:
    DeltaSink(table, settings).append_rows(_row(table, **values), Step.EVENTS, Transaction("query", batch))


def _commit_path(settings: Settings, table: Table, version: int) -> Path:
    return Path(settings.table_uri(table.name)) / "_delta_log" / f"{version:020d}.json"


def _rows(settings: Settings, table: Table) -> int:
    return int(DeltaTable(settings.table_uri(table.name)).to_pyarrow_table().num_rows)


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    settings = load_settings(home=tmp_path / "home")
    ensure_tables(settings)
    return settings


WAYS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut off": lambda text: text[: len(text) // 2],
    "zeros": lambda text: b"\0" * len(text),
}


def test_a_torn_last_commit_of_every_table_is_set_aside(home: Settings, caplog: pytest.LogCaptureFixture) -> None:
    for number, table in enumerate(TABLES.values()):
        _append(home, table, 0)
        _append(home, table, 1)
        path = _commit_path(home, table, 2)
        torn = list(WAYS.values())[number % len(WAYS)](path.read_bytes())
        path.write_bytes(torn)
        with pytest.raises(TableCorruptionError, match="adtally ingest"):
            DeltaLog(home.table_uri(table.name)).latest_version()
    ensure_tables(home)
    assert len(caplog.messages) == len(TABLES)
    for table, message in zip(TABLES.values(), caplog.messages, strict=True):
        assert message.startswith(f"adtally: table {table.name}: version 2 was torn by a power cut")
        assert DeltaLog(home.table_uri(table.name)).latest_version() == 1
        assert _rows(home, table) == 1
        assert len(list(_commit_path(home, table, 2).parent.glob(".torn-*2-*.json"))) == 1
        _append(home, table, 1)  # whoever made it makes it again
        assert _rows(home, table) == 2
    assert mend_tables(home) == []


def test_a_table_whose_creation_was_torn_is_created_again(home: Settings) -> None:
    for table in TABLES.values():
        _commit_path(home, table, 0).write_bytes(b"")
    ensure_tables(home)
    assert all(_rows(home, table) == 0 for table in TABLES.values())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_damage_in_the_middle_of_a_log_is_refused(home: Settings, way: Callable[[bytes], bytes]) -> None:
    for batch in range(3):
        _append(home, BATCH_LEDGER, batch)
    path = _commit_path(home, BATCH_LEDGER, 2)
    path.write_bytes(way(path.read_bytes()))
    log = DeltaLog(home.table_uri(BATCH_LEDGER.name))
    if not path.stat().st_size:
        with pytest.raises(TableCorruptionError, match="adtally fsck"):
            ensure_tables(home)
    with pytest.raises(TableCorruptionError, match="adtally fsck"):
        list(log.commits_backwards())
    assert path.exists()


def test_a_log_that_is_gone_as_a_whole_is_no_torn_tail(home: Settings) -> None:
    for batch in range(3):
        _append(home, EVENTS, batch)
    for version in range(4):
        _commit_path(home, EVENTS, version).write_bytes(b"")
    with pytest.raises(TableCorruptionError, match=r"last 4 commits of table events cannot be read.*adtally fsck"):
        ensure_tables(home)
    assert _commit_path(home, EVENTS, 3).exists()


def test_a_merge_whose_files_were_lost_is_set_aside_unless_the_ledger_has_its_batch(home: Settings) -> None:
    uri = home.table_uri(ORDERS.name)
    for batch in (0, 1):
        merge_orders(_row(ORDERS, order_id=f"o{batch}"), home, Transaction("query", batch), {})
    commit = DeltaLog(uri).commit(2)
    assert commit is not None
    data = Path(uri) / commit.added[0]["path"]
    whole = data.read_bytes()
    data.write_bytes(b"")

    _append(home, BATCH_LEDGER, 1)  # a later table has the batch: this was no power cut
    assert mend_tables(home) == []
    _append(home, BATCH_LEDGER, 2)
    assert mend_tables(home) == []

    _commit_path(home, BATCH_LEDGER, 2).unlink()
    _commit_path(home, BATCH_LEDGER, 1).unlink()
    (said,) = mend_tables(home)
    assert "table orders: version 2 was torn" in said
    data.write_bytes(whole)
    assert _rows(home, ORDERS) == 1


def test_a_compaction_whose_files_were_lost_is_set_aside(home: Settings) -> None:
    uri = home.table_uri(ORDERS.name)
    for batch in (0, 1):
        merge_orders(_row(ORDERS, order_id=f"o{batch}"), home, Transaction("query", batch), {})
    assert rearrange(Lake(home), ORDERS, 2, (), 10**8, "run")
    commit = DeltaLog(uri).commit(3)
    assert commit is not None
    (Path(uri) / commit.added[0]["path"]).unlink()
    (said,) = mend_tables(home)
    assert "table orders: version 3 was torn" in said
    assert _rows(home, ORDERS) == 2


def test_a_torn_checkpoint_of_a_log_is_set_aside(home: Settings) -> None:
    for batch in range(3):
        _append(home, EVENTS, batch)
    DeltaTable(home.table_uri(EVENTS.name)).create_checkpoint()
    folder = _commit_path(home, EVENTS, 0).parent
    (checkpoint,) = folder.glob("*.checkpoint.parquet")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    assert len(mend_tables(home)) == 2
    assert {path.name for path in folder.iterdir() if "checkpoint" in path.name and not path.name.startswith(".")} == set()
    assert _rows(home, EVENTS) == 3
    DeltaTable(home.table_uri(EVENTS.name)).create_checkpoint()
    (folder / "_last_checkpoint").write_bytes(b"")
    assert len(mend_tables(home)) == 1
    assert json.loads(_commit_path(home, EVENTS, 3).read_text().splitlines()[0])


def test_what_is_derived_from_a_torn_version_is_not_believed(home: Settings) -> None:
    """Another commit gets the number: neither the key index nor the recount's plans may keep what they took from the torn one."""
    index = KeyIndex(home.key_index_path)
    for batch, name in enumerate("ab"):
        rows = _row(EVENTS, event_id=name, fingerprint=1)
        with DataFileWriter(home.table_uri(EVENTS.name), EVENTS) as writer:
            writer.write(rows)
        plan = {"query_id": "query", "batch_id": batch, "limits": dict.fromkeys(_LIMITS, 0), "campaigns_version": 0, "files": []}
        DeltaSink(EVENTS, home).append(writer.files, Step.EVENTS, Transaction("query", batch), plan)
        bring_index_to(home, index, batch + 1)
        assert len(read_plans(home, batch + 1)) == batch + 1
    _commit_path(home, EVENTS, 2).write_bytes(b"")
    mend_tables(home)
    assert [plan.batch_id for plan in read_plans(home, 1)] == [0]
    _append(home, EVENTS, 1, event_id="c", fingerprint=1)
    assert [plan.batch_id for plan in read_plans(home, 2)] == [0]
    bring_index_to(home, index, 2)
    keys = keys_of_ids(pa.table({"event_id": ["a", "b", "c"], "fingerprint": [1, 1, 1]}), "event_id", "fingerprint")
    keys = keys.take(keys.order)
    found, _ = index.lookup(keys.low, keys.high)
    held = {tuple(key) for key in zip(keys.low[found].tolist(), keys.high[found].tolist(), strict=True)}
    expected = keys_of_ids(pa.table({"event_id": ["a", "c"], "fingerprint": [1, 1]}), "event_id", "fingerprint")
    assert held == set(zip(expected.low.tolist(), expected.high.tolist(), strict=True))
