"""Corrections across a power cut: finished if they were decided whole, discarded without a trace if not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from spark_jobs.attribution.job import attribute
from spark_jobs.billing.job import bill
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.run import correcting
from spark_jobs.corrections.write_ahead import Correction, TableChange, write_ahead
from spark_jobs.errors import TableCorruptionError
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.places import StorePlace, open_place
from spark_jobs.lake.tables import BATCH_LEDGER, HOUR_RULES, RESTATEMENTS, Table
from spark_jobs.lake.writes import DeltaSink, ensure_tables
from spark_jobs.steps import Step

CHANGED = (BATCH_LEDGER, RESTATEMENTS, HOUR_RULES)


def _reconciles(settings: Settings) -> None:
    with correcting(settings):
        pass


USERS: dict[str, Callable[[Settings], object]] = {
    "reconcile, review and backfill": _reconciles,
    "attribute": attribute,
    "bill": bill,
}


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


TEARS: dict[str, Callable[[Path], None]] = {
    "empty manifest": lambda folder: _empty(folder / "manifest.json"),
    "cut manifest": lambda folder: _cut(folder / "manifest.json"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "empty part": lambda folder: _empty(folder / "restatements.add.parquet"),
    "missing part": lambda folder: (folder / "restatements.add.parquet").unlink(),
    "changed part": lambda folder: _flip(folder / "restatements.add.parquet"),
}


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    settings = load_settings(home=tmp_path / "home")
    ensure_tables(settings)
    _decide(settings)
    return settings


def _decide(settings: Settings) -> None:
    changes = [TableChange(table, table.schema.empty_table(), _rows(table)) for table in CHANGED]
    write_ahead(settings, Correction("token", "run", 0, changes))


def _rows(table: Table) -> pa.Table:
    return pa.Table.from_pylist([dict.fromkeys(table.schema.names)], table.schema)


def _count(settings: Settings) -> list[int]:
    snapshot = Lake(settings).pin(*CHANGED)
    return [snapshot.rows(table).num_rows for table in CHANGED]


@pytest.mark.parametrize("use", USERS.values(), ids=USERS.keys())
def test_a_whole_one_is_finished_by_whoever_comes_next(home: Settings, use: Callable[[Settings], object]) -> None:
    use(home)
    assert _count(home) == [1, 1, 1]
    assert list((home.home_path / "corrections").iterdir()) == []
    use(home)
    assert _count(home) == [1, 1, 1]


@pytest.mark.parametrize("use", USERS.values(), ids=USERS.keys())
@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS.keys())
def test_a_torn_one_is_discarded(
    home: Settings, tear: Callable[[Path], None], use: Callable[[Settings], object], caplog: pytest.LogCaptureFixture
) -> None:
    tear(home.home_path / "corrections" / "token")
    use(home)
    assert _count(home) == [0, 0, 0]
    assert list((home.home_path / "corrections").iterdir()) == []
    was_decided = tear is not TEARS["no manifest"]
    warning = "adtally: correction token was torn by a power cut before its first commit and is discarded"
    assert caplog.messages == [warning] * was_decided


@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS.keys())
def test_one_that_was_damaged_half_way_is_refused(home: Settings, tear: Callable[[Path], None]) -> None:
    DeltaSink(BATCH_LEDGER, home).append_rows(_rows(BATCH_LEDGER), Step.CORRECTED_LEDGER, Transaction("token", 0))
    tear(home.home_path / "corrections" / "token")
    for use in USERS.values():
        with pytest.raises(TableCorruptionError, match=r"token cannot be read .*batch_ledger has its changes.*reconcile --repair"):
            use(home)


def test_one_that_an_older_adtally_decided_has_no_checksums(home: Settings) -> None:
    path = home.home_path / "corrections" / "token" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert sorted(manifest.pop("parts")) == sorted(f"{t.name}.{part}.parquet" for t in CHANGED for part in ("add", "remove"))
    path.write_text(json.dumps(manifest))
    _reconciles(home)
    assert _count(home) == [1, 1, 1]


class Lost(BaseException):
    """The machine is lost."""


@pytest.fixture
def machines(prefix: str, tmp_path: Path) -> tuple[Settings, Settings]:
    """Two machines on one lakehouse in a store, which has its tables."""
    one, two = (load_settings(home=tmp_path / name, lakehouse=prefix, lease_seconds=2) for name in ("one", "two"))
    ensure_tables(one)
    return one, two


def _left(settings: Settings) -> list[str]:
    return [found.name for found in open_place(f"{settings.state_uri}/corrections").list()]


def test_another_machine_finishes_what_one_decided(machines: tuple[Settings, Settings]) -> None:
    one, two = machines
    _decide(one)
    shutil.rmtree(one.home_path, ignore_errors=True)
    _reconciles(two)
    assert _count(two) == [1, 1, 1]
    assert _left(two) == []


@pytest.mark.parametrize("writes", [0, 3, 6, 7, 8])
def test_a_machine_is_lost_at_a_request(writes: int, machines: tuple[Settings, Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    """Six parts, then the manifest decides; the manifest of a finished one is replaced, then all is deleted."""
    one, two = machines
    left = iter(range(writes))
    write = StorePlace.write

    def lost(self: StorePlace, name: str, data: bytes) -> None:
        if next(left, None) is None:
            raise Lost
        write(self, name, data)

    def lost_too(self: StorePlace, names: object) -> None:
        raise Lost

    with monkeypatch.context() as patch, pytest.raises(Lost):
        patch.setattr(StorePlace, "write", lost)
        patch.setattr(StorePlace, "delete", lost_too)
        patch.setattr("spark_jobs.corrections.write_ahead._THREADS", 1)
        _decide(one)
        _reconciles(one)
    decided = int(writes > 6)
    assert _count(two) == [decided] * 3
    for _ in range(2):
        _reconciles(two)
        assert _count(two) == [decided] * 3
        assert _left(two) == []
