"""Whatever is damaged: `fsck` names it and changes nothing, `fsck --repair` puts it right, and the totals are as before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import correct
import lake
import numpy as np
import pytest
from deltalake import DeltaTable
from local import LocalEvents, LocalOrders

from spark_jobs.attribution.job import attribute
from spark_jobs.billing.job import bill
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.errors import BusyError, TableCorruptionError
from spark_jobs.ingest.dedupe.index import KeyIndex
from spark_jobs.ingest.events import bring_index_to, keys_of_version
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import TABLES
from spark_jobs.operate.fsck import fsck
from spark_jobs.operate.health import read_signal
from spark_jobs.operate.status import read_status
from spark_jobs.operate.watermark import close_by_hand, read_closing
from tests.spark_jobs.homes.faults import MADE_UP

pytestmark = pytest.mark.homes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, empty_lakehouse: Path) -> Settings:
    """A home with accepted, duplicate, conflicting, rejected and late records in several batches; nobody changes it."""
    made = load_settings(home=tmp_path_factory.mktemp("fsck") / "home")
    shutil.copytree(empty_lakehouse, made.lakehouse_uri)
    lake.campaigns(made)
    job = LocalEvents(made)
    for batch in range(4):
        times = [f"2025-06-02T{8 + (number + batch) % 4:02d}:{number % 60:02d}:00Z" for number in range(120)]
        records = [
            lake.event(f"e{batch}-{number}", event_time=at, received_at="2025-06-02T11:59:30Z", user_id=f"u{number}")
            for number, at in enumerate(times)
        ]
        job.take(
            [*records, records[0], lake.event("t1", user_id=f"u-{batch}"), {"event_id": "bad"}], ("eu-west", "us-east")[batch % 2]
        )
    orders = LocalOrders(made, "orders")
    for batch in range(2):
        orders.take([*(lake.order(f"o{batch}-{number}") for number in range(20)), lake.order("o0-0"), {"order_id": "bad"}])
    return made


@pytest.fixture
def home(base: Settings, tmp_path: Path) -> Settings:
    """A copy of the base home to tamper with."""
    return correct.copied(base, tmp_path / "home")


@pytest.fixture(scope="module")
def truth(base: Settings) -> dict[str, Any]:
    """What the base home holds."""
    return correct.contents(base)


def _data_file(home: Settings, table: str) -> Path:
    """The largest data file of a table."""
    files = correct.select_files(home, table)
    return max(files, key=lambda path: path.stat().st_size)


def _flip_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = len(data) // 3
    data[at : at + 64] = bytes(byte ^ 0xFF for byte in data[at : at + 64])  # delta-rs, which writes orders, keeps no checksum
    path.write_bytes(data)


DAMAGES: list[Any] = [
    pytest.param(lambda path: path.unlink(), "file_missing", id="missing"),
    pytest.param(lambda path: path.write_bytes(b""), "file_size", id="empty"),
    pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-50]), "file_size", id="cut"),
    pytest.param(_flip_middle, "file_damaged", id="bit flipped"),
]


@pytest.mark.parametrize(("damage", "kind"), DAMAGES)
def test_damaged_data_files_are_named_and_come_back_from_the_raw_input(
    home: Settings, truth: dict[str, Any], damage: Callable[[Path], None], kind: str
) -> None:
    tables = {
        "file_missing": ["batch_ledger"],
        "file_size": ["batch_ledger", "events", "minute_metrics", "rejected_events"],
        "file_damaged": ["events", "orders", "rejected_orders"],
    }[kind]
    paths = [_data_file(home, table) for table in tables]
    for path in paths:
        damage(path)
    found = fsck(home)
    told = sorted(found.findings, key=lambda f: f.place)
    assert [(f.kind, f.place, f.can_repair, f.is_repaired) for f in told] == [(kind, table, True, False) for table in tables]
    assert [Path(f.path).name for f in told] == [path.name for path in paths]
    with pytest.raises(TableCorruptionError, match="fsck"):
        read_status(home)
    repaired = fsck(home, repair=True)
    assert sorted((f.kind, f.place, f.is_repaired) for f in repaired.findings) == [(kind, table, True) for table in tables]
    assert correct.contents(home) == truth
    assert reconcile(home, None).differences == []


def test_lost_rows_of_the_ledger_come_back_with_the_progress_of_their_sources(home: Settings, truth: dict[str, Any]) -> None:
    """Hours close by it: without it a closed hour would open again, and a region would be awaited that has sent long ago."""
    before = read_closing(home)
    assert before.closed_through is not None
    correct.delete(home, "batch_ledger", "true")
    assert read_closing(home) != before
    assert not reconcile(home, None, repair=True).remaining
    assert correct.contents(home) == truth
    assert read_closing(home) == before


@pytest.mark.parametrize("damage", [DAMAGES[2].values[0], _flip_middle], ids=["cut", "bits flipped"])
def test_a_file_that_was_added_and_damaged_since_the_last_bill_stops_no_bill(
    home: Settings, damage: Callable[[Path], None]
) -> None:
    """It is taken out of the table, but the commit that added it is one of those since the last bill. So for `adtally status`."""
    close_by_hand(home, datetime(2025, 6, 3, tzinfo=UTC), reason="the day has ended", closed_by="a test")
    assert bill(home).lines
    assert read_status(home).problems == []
    path = _data_file(home, "batch_ledger")
    for _ in range(2):  # the second time what the first repair has added
        known = set(correct.select_files(home, "batch_ledger"))
        damage(path)
        assert [(found.kind, found.is_repaired) for found in fsck(home, repair=True).findings if found.place == "batch_ledger"]
        path = (set(correct.select_files(home, "batch_ledger")) - known).pop()
    assert bill(home).lines == []
    assert read_status(home).problems == []


def test_a_file_of_orders_that_was_damaged_since_the_last_attribution_stops_none(home: Settings) -> None:
    attribute(home)
    path = _data_file(home, "orders")
    path.write_bytes(path.read_bytes()[:-50])
    assert [found.is_repaired for found in fsck(home, repair=True).findings] == [True]
    attribute(home)
    with pytest.raises(FileNotFoundError, match="is damaged"):
        Lake(home).read_files(TABLES["orders"], [path.name], "order_id")


@pytest.mark.parametrize(("table", "name"), [("batch_ledger", "rejected_share"), ("events", "user_share")])
def test_a_file_of_the_last_hour_that_was_taken_out_stops_no_alert(home: Settings, table: str, name: str) -> None:
    _data_file(home, table).unlink()
    assert read_signal(home, name).value is None
    assert [found.is_repaired for found in fsck(home, repair=True).findings if found.place == table] == [True]
    assert read_signal(home, name).value is not None


def test_an_ingest_that_starts_while_fsck_reads_hears_of_it(home: Settings) -> None:
    heard: list[str] = []

    def ingest(_line: str) -> None:
        if not heard:
            with pytest.raises(BusyError, match=r"another ingest \(or fsck\) runs") as refused:
                run_ingest(home)
            heard.append(str(refused.value))

    assert fsck(home, progress=ingest).findings == []
    assert heard


def test_a_whole_home_has_no_finding(base: Settings) -> None:
    report = fsck(base)
    assert report.findings == []
    assert report.tables == len(TABLES) and report.files > 20 and report.bytes > 10_000


def test_a_key_index_that_is_not_the_table_s_is_named_and_rebuilt(home: Settings) -> None:
    for damage in ("flip", "lacks a key"):
        if damage == "flip":
            _flip_middle(next(home.key_index_path.glob("run-*.keys")))
        else:
            index = KeyIndex(home.key_index_path)
            parts = [keys.take(np.arange(1, len(keys))) for keys in index.parts()]
            index.rebuild(str(index.table_id), parts, index.version, index.commit)
        assert [(f.kind, f.place) for f in fsck(home).findings] == [("key_index", "key_index")]
        assert [f.is_repaired for f in fsck(home, repair=True).findings] == [True]
        assert fsck(home).findings == []


def test_every_index_of_attribution_is_checked(home: Settings) -> None:
    LocalEvents(home, "clicks").take([lake.event("click", event_type="click")])
    attribute(home)
    assert [f for f in fsck(home).findings if f.kind == "attribution_index"] == []
    runs = sorted((home.home_path / "attribution_index").glob("*/run-*.arrow"))
    assert {path.parent.name for path in runs} >= {"orders", "touches"}
    for path in runs:
        whole = path.read_bytes()
        _flip_middle(path)
        assert [f.place for f in fsck(home).findings] == [f"attribution_index/{path.parent.name}"]
        path.write_bytes(whole)


def test_an_index_of_a_table_that_went_on_otherwise_is_rebuilt(home: Settings) -> None:
    """The last commit of events is rolled back, as a torn one is, and another takes its number."""
    log = Path(home.table_uri("events")) / "_delta_log"
    index = KeyIndex(home.key_index_path)
    newest = int(DeltaLog(home.table_uri("events")).latest_version() or 0)
    bring_index_to(home, index, newest)
    (log / f"{newest:020d}.json").unlink()
    correct.append(home, "events", MADE_UP)
    assert [f.kind for f in fsck(home).findings if f.place == "key_index"] == ["key_index"]
    again = KeyIndex(home.key_index_path)
    bring_index_to(home, again, newest)
    keys = sum(len(part) for part in keys_of_version(home, newest))
    assert again.rows == keys


def test_commits_and_checkpoints_of_the_log(home: Settings) -> None:
    uri = home.table_uri("events")
    log = Path(uri) / "_delta_log"
    middle = log / f"{2:020d}.json"
    kept = middle.read_bytes()
    middle.write_bytes(b"")
    assert [(f.kind, f.can_repair) for f in fsck(home).findings] == [("commit_unreadable", False)]
    middle.write_bytes(kept)
    assert fsck(home).findings == []
    DeltaTable(uri).create_checkpoint()
    middle.write_bytes(kept[:40])
    assert [(f.kind, f.place) for f in fsck(home).findings] == [("commit_covered", "events")]
    middle.write_bytes(kept)
    (checkpoint,) = log.glob("*.checkpoint.parquet")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert [(f.kind, f.can_repair) for f in fsck(home).findings] == [("log_checkpoint", True)]
    assert [f.is_repaired for f in fsck(home, repair=True).findings] == [True]
    assert not list(log.glob("*.checkpoint.parquet"))


def test_what_the_raw_input_cannot_give_back_is_said(home: Settings) -> None:
    _data_file(home, "events").unlink()
    shutil.rmtree(home.landing_path / "events" / "eu-west")
    shutil.rmtree(home.landing_path / "events" / "us-east")
    report = fsck(home, repair=True)
    assert {f.kind for f in report.remaining} >= {"recount"}
    assert any("gone or has changed" in f.detail for f in report.remaining)


def test_a_file_that_nothing_can_give_back_is_left_alone(home: Settings) -> None:
    _data_file(home, "campaigns").unlink()
    version = DeltaTable(home.table_uri("campaigns")).version()
    (found,) = [f for f in fsck(home, repair=True).findings if f.place == "campaigns"]
    assert (found.kind, found.can_repair, found.is_repaired) == ("file_missing", False, False)
    assert "backup" in found.way_out
    assert DeltaTable(home.table_uri("campaigns")).version() == version


def test_a_batch_whose_file_changed_is_finished_from_its_records(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = home.checkpoints_path / "events"
    (checkpoint / "offsets").mkdir(parents=True)
    (checkpoint / "metadata").write_text('{"id": "killed"}')
    (checkpoint / "offsets" / "0").write_text("v1\n{}\n")  # the batch is planned
    job = LocalEvents(home, "killed")

    def stop(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(job, "commit_derived", stop)
        job.take([lake.event("k1"), lake.event("k2", event_type="click", campaign_id="c-cpc"), {"event_id": "bad"}])
    path = home.landing_path / "events" / "eu-west" / "killed-0000.jsonl"
    whole = path.read_bytes()
    assert fsck(home).findings == []  # the next ingest will finish it
    path.write_bytes(whole.replace(b"k1", b"k3"))
    (found,) = fsck(home).findings
    assert (found.kind, found.place) == ("batch_file_changed", "events")
    assert "events/eu-west/killed-0000.jsonl" in found.detail
    repaired = fsck(home, repair=True)
    assert [(f.kind, f.is_repaired) for f in repaired.findings] == [("batch_file_changed", True)], repaired.findings
    batch = "_query_id = 'killed'"
    booked = "sum(offered)::bigint, sum(accepted)::bigint, sum(rejected)::bigint, sum(spend_nanos)::bigint"
    assert correct.rows(home, f"select {booked} from batch_ledger where {batch}") == [(3, 2, 1, 1500 + 1_500_000)]
    sums = "sum(impressions)::bigint, sum(clicks)::bigint, sum(spend_nanos)::bigint"
    of_events = "count(*) filter (event_type = 'impression'), count(*) filter (event_type = 'click'), sum(spend_nanos)::bigint"
    assert correct.rows(home, f"select {sums} from minute_metrics where {batch}") == correct.rows(
        home, f"select {of_events} from events where {batch}"
    )
    assert read_status(home).conservation_holds
    assert fsck(home, repair=True).findings == []
