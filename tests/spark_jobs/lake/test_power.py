"""Every way to write a table, on a disk whose power is cut right after: what was committed is there, and nothing is empty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from services.simulator.chaos import power
from spark_jobs import disk as disk_module
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.write_ahead import Correction, TableChange, unfinished_corrections, write_ahead
from spark_jobs.errors import TableCorruptionError
from spark_jobs.ingest.durable_checkpoint import CheckpointSync
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.removal import delete_unneeded_files
from spark_jobs.lake.rewrite import rearrange
from spark_jobs.lake.tables import BATCH_LEDGER, CAMPAIGNS, HOUR_CLOSINGS, ORDERS, RULE_SETS, TABLES, Table
from spark_jobs.lake.writes import DeltaSink, ensure_tables, merge_orders
from spark_jobs.steps import Step


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[power.LoopDisk]:
    reason = power.why_not(tmp_path / "try")
    if reason is not None:
        pytest.skip(f"the power cut needs {power.LAYER}: {reason}")
    with power.LoopDisk(tmp_path, megabytes=256) as made:
        yield made


def _row(table: Table, **values: Any) -> pa.Table:
    return pa.Table.from_pylist([{**dict.fromkeys(table.schema.names), **values}], table.schema)


def _write_everything(settings: Settings) -> None:
    ensure_tables(settings)
    for table in TABLES.values():
        DeltaSink(table, settings).append_rows(_row(table), Step.EVENTS, Transaction("query", 0))
    tables = Lake(settings)
    tables.replace(CAMPAIGNS, _row(CAMPAIGNS, campaign_id="c"), Step.CAMPAIGNS, metadata={})
    tables.append(RULE_SETS, _row(RULE_SETS, rule_set="r"), Step.RULE_SETS)
    tables.append(HOUR_CLOSINGS, _row(HOUR_CLOSINGS), Step.HOUR_CLOSINGS)
    for number in range(3):
        merge_orders(_row(ORDERS, order_id=f"o{number}"), settings, Transaction("query", number + 1), {})
    assert rearrange(tables, ORDERS, tables.version(ORDERS) or 0, (), 10**8, "run")
    delete_unneeded_files(tables, CAMPAIGNS, 0, [])
    changes = [TableChange(BATCH_LEDGER, BATCH_LEDGER.schema.empty_table(), _row(BATCH_LEDGER))]
    write_ahead(settings, Correction("token", "run", 0, changes))
    offsets = settings.checkpoints_path / "events" / "offsets"
    offsets.mkdir(parents=True)
    (offsets / "0").write_text("v1\n{}")
    CheckpointSync(settings.checkpoints_path / "events").before_commit()


def _rows(settings: Settings) -> dict[str, int]:
    return {name: DeltaTable(settings.table_uri(name)).to_pyarrow_table().num_rows for name in TABLES}


def _versions(settings: Settings) -> dict[str, int | None]:
    return {name: DeltaLog(settings.table_uri(name)).latest_version() for name in TABLES}


@pytest.mark.parametrize("seconds_later", [False, True], ids=["at once", "seconds later"])
def test_what_is_committed_survives(seconds_later: bool, disk: power.LoopDisk) -> None:
    settings = load_settings(home=disk.path / "home")
    _write_everything(settings)
    rows, versions = _rows(settings), _versions(settings)
    disk.cut(seconds_later=seconds_later)
    assert (_rows(settings), _versions(settings)) == (rows, versions)
    assert [path for path in settings.home_path.rglob("*.json") if not path.stat().st_size] == []
    assert [correction.token for correction in unfinished_corrections(settings)] == ["token"]
    assert (settings.checkpoints_path / "events" / "offsets" / "0").read_text() == "v1\n{}"


@pytest.mark.parametrize("seconds_later", [False, True], ids=["at once", "seconds later"])
def test_this_disk_loses_what_is_not_synced(seconds_later: bool, disk: power.LoopDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test above can fail: the same without a sync."""
    settings = load_settings(home=disk.path / "home")
    ensure_tables(settings)
    monkeypatch.setattr(disk_module, "_sync", lambda *_: None)
    DeltaSink(BATCH_LEDGER, settings).append_rows(_row(BATCH_LEDGER), Step.EVENTS, Transaction("query", 0))
    disk.cut(seconds_later=seconds_later)
    log = DeltaLog(settings.table_uri(BATCH_LEDGER.name))
    if seconds_later:  # its name is there, and it is empty
        with pytest.raises(TableCorruptionError, match="adtally ingest"):
            log.latest_version()
        ensure_tables(settings)
    assert log.latest_version() == 0
