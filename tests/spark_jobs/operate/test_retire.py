"""Raw input after its retention: what is archived or dropped, what is kept, and what a recount says from then on."""

from __future__ import annotations

import hashlib
import shutil
import signal
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import correct
import lake
import pyarrow as pa
import pytest
from killed import run_code
from local import LocalEvents

from spark_jobs.audit import raw
from spark_jobs.audit.checkpoints import TopicQuery, query_key
from spark_jobs.audit.plans import BatchPlan, PlannedRange
from spark_jobs.audit.raw import RawTable
from spark_jobs.audit.verify import verify
from spark_jobs.billing.job import bill
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.backfill import backfill
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.erasure.job import erase, prove
from spark_jobs.errors import ConfigurationError, UsageError
from spark_jobs.ingest.campaigns import load_campaigns
from spark_jobs.ingest.release import read_quarantine, release_file
from spark_jobs.lake.acts import read_audit_log
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.landing_view import land_folder, refresh_landing, remove_landed
from spark_jobs.lake.places import open_place
from spark_jobs.lake.retirements import recountable_from
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, RAW_EVENTS
from spark_jobs.operate import retire as module
from spark_jobs.operate.fsck import fsck
from spark_jobs.operate.retire import retire
from spark_jobs.operate.status import read_status
from spark_jobs.operate.vacuum import vacuum
from spark_jobs.operate.watermark import close_by_hand
from spark_jobs.steps import CRASH_VARIABLE, Step
from spark_jobs.units import HourRange

pytestmark = pytest.mark.homes

NOW = datetime(2025, 6, 10, tzinfo=UTC)
OLD = datetime(2025, 6, 2, 10, tzinfo=UTC)
NEW = datetime(2025, 6, 4, 10, tzinfo=UTC)


def at(moment: datetime) -> dict[str, str]:
    return {"event_time": moment.isoformat(), "received_at": (moment + timedelta(seconds=1)).isoformat()}


def click(name: str, moment: datetime, **changes: Any) -> dict[str, Any]:
    return lake.event(name, event_type="click", campaign_id="c-cpc", user_id=f"u-{name}", **at(moment), **changes)


def settle(home: Settings, through: datetime) -> None:
    """Close, recount and bill all hours before a time."""
    close_by_hand(home, through, reason="test", closed_by="me", now=NOW)
    assert not reconcile(home, None).differences
    bill(home, now=NOW)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, empty_lakehouse: Path) -> Settings:
    """A home with a settled day in two files, and a later day that is not billed; nobody changes it."""
    made = load_settings(home=tmp_path_factory.mktemp("retire") / "home")
    shutil.copytree(empty_lakehouse, made.lakehouse_uri)
    lake.campaigns(made)
    load_campaigns(made)
    batches = LocalEvents(made)
    far = lake.event("far", event_time=(NOW + timedelta(days=900)).isoformat())  # a lying clock: rejected
    batches.take([click("a", OLD), click("b", OLD), lake.event("broken", currency="none"), far])
    batches.take([click("a", OLD), click("c", OLD + timedelta(hours=1))])
    settle(made, datetime(2025, 6, 3, tzinfo=UTC))
    batches.take([click("d", NEW), click("a", OLD), click("b", OLD, price_micros=7)])
    return made


@pytest.fixture
def home(grown: Settings, tmp_path: Path) -> Settings:
    return retiring(correct.copied(grown, tmp_path / "home"), raw_archive=tmp_path / "archive")


def retiring(home: Settings, **changes: Any) -> Settings:
    return load_settings(home=home.home_path, raw_retention=2, **changes)


def landed(home: Settings) -> list[str]:
    return sorted(path.name for path in (home.landing_path / "events/eu-west").iterdir())


def archived(home: Settings) -> dict[str, str]:
    place = open_place(str(home.raw_archive_uri))
    return {found.name: hashlib.sha256(place.read(found.name)).hexdigest() for found in place.list()}


def test_only_what_is_recounted_and_billed_is_archived(home: Settings) -> None:
    before = {name: (home.landing_path / "events/eu-west" / name).read_bytes() for name in landed(home)}
    dry = retire(home, now=NOW, dry_run=True)
    assert (dry.files, dry.waiting, len(landed(home)), archived(home)) == (2, 1, 3, {})
    report = retire(home, now=NOW, run_id="run-1")
    assert (report.files, report.waiting) == (2, 1)
    assert report.recountable_from == recountable_from(home) == datetime(2025, 6, 2, 12, tzinfo=UTC)
    gone = sorted(before.keys() - set(landed(home)))
    assert len(gone) == 2
    wanted = {f"events/eu-west/{name}": hashlib.sha256(before[name]).hexdigest() for name in gone}
    assert archived(home) == wanted
    assert dict(correct.rows(home, "select source_file, sha256 from raw_retirements")) == wanted
    assert [(entry.act, entry.run_id) for entry in read_audit_log(home)][-1] == ("retire", "run-1")
    again = retire(home, now=NOW)
    assert (again.files, again.waiting) == (0, 1)


def test_a_recount_speaks_of_later_hours_and_finds_no_difference(home: Settings) -> None:
    contents = correct.contents(home)
    retire(home, now=NOW)
    report = reconcile(home, None, repair=True)
    assert (report.differences, report.recountable_from) == ([], datetime(2025, 6, 2, 12, tzinfo=UTC))
    assert min(hour.hour for hour in report.hours) >= datetime(2025, 6, 2, 12, tzinfo=UTC)
    assert correct.contents(home) == contents
    assert read_status(home).problems == []
    correct.delete(home, "events", "event_id = 'd'")
    assert {found.cause for found in reconcile(home, None).differences} == {"event_lost"}
    assert not reconcile(home, None, repair=True).remaining
    assert correct.contents(home) == contents


def test_a_duplicate_of_a_retired_record_stays_one(home: Settings) -> None:
    retire(home, now=NOW)
    LocalEvents(home, "later").take([click("a", OLD), click("c", OLD + timedelta(hours=1), ad_id="other"), click("e", NEW)])
    assert correct.rows(home, "select sum(duplicate)::bigint, sum(conflict)::bigint from batch_ledger") == [(3, 2)]
    assert not reconcile(home, None).differences
    settle(home, datetime(2025, 6, 5, tzinfo=UTC))
    assert retire(home, now=NOW).files == 2
    assert not reconcile(home, None).differences


def test_backfill_verify_and_fsck_say_from_when_they_speak(home: Settings) -> None:
    retire(home, now=NOW)
    with pytest.raises(UsageError, match=r"hours before 2025-06-02T12Z cannot be recomputed"):
        backfill(home, HourRange.of(OLD), now=NOW)
    report = verify(home, now=NOW)
    assert (report.findings, report.days, report.recountable_from) == ([], [], datetime(2025, 6, 2, 12, tzinfo=UTC))
    assert fsck(home).findings == []
    damaged = [Lake(home).pin(table).files(table)[0] for table in (EVENTS, BATCH_LEDGER)]
    for table, file in zip((EVENTS, BATCH_LEDGER), damaged, strict=True):
        path = Path(home.table_uri(table.name)) / file.path
        path.write_bytes(path.read_bytes()[:-9])
    rows = Lake(home).pin(BATCH_LEDGER).size(BATCH_LEDGER)
    found = fsck(home, repair=True).remaining
    assert found
    assert all("whose raw input is retired" in one.way_out for one in found if one.place in ("events", "batch_ledger"))
    assert Lake(home).pin(BATCH_LEDGER).size(BATCH_LEDGER) == rows  # nothing was taken out that no recount can bring back


def test_input_of_erased_people_is_retired_and_archived_input_is_rewritten(home: Settings) -> None:
    """The file that an erasure has rewritten is the one that the batches took; in the archive the id goes, too."""
    retire(home, now=NOW)
    settle(home, datetime(2025, 6, 5, tzinfo=UTC))
    (run,) = erase(home, ["u-a", "u-d"], now=NOW)
    prove(home, run, now=NOW)
    assert retire(home, now=NOW).files == 1
    texts = [open_place(str(home.raw_archive_uri)).read(name).decode() for name in archived(home)]
    assert len(texts) == 3
    assert not [text for text in texts if '"u-a"' in text or '"u-d"' in text]
    assert sum(text.count('"u-b"') for text in texts) == 2
    kinds = correct.rows(home, "select kind, count(*) from erasures group by 1 order by 1")
    assert kinds == [("archived_file", 2), ("file", 1), ("receipt", 2)]
    assert not reconcile(home, None).differences


CODE = """
from datetime import UTC, datetime
from spark_jobs.config import load_settings
from spark_jobs.operate.retire import retire
retire(load_settings(), now=datetime(2025, 6, 10, tzinfo=UTC))
"""


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", [Step.RAW_ARCHIVED, Step.RAW_RETIREMENTS, Step.RAW_REMOVED])
def test_killed_at_every_step_the_next_run_ends_it(home: Settings, step: Step, moment: str) -> None:
    variables = {"ADTALLY_HOME": home.home_path, "ADTALLY_RAW_RETENTION": 2, "ADTALLY_RAW_ARCHIVE": home.raw_archive_uri}
    environment = {name: str(value) for name, value in variables.items()}
    assert run_code(CODE, **environment, **{CRASH_VARIABLE: f"{moment}:{step}:0"}) == -signal.SIGKILL
    assert not reconcile(home, None).differences
    retire(home, now=NOW)
    assert (len(landed(home)), len(archived(home))) == (1, 2)
    assert correct.rows(home, "select count(*), count(distinct source_file) from raw_retirements") == [(2, 2)]
    assert not reconcile(home, None).differences
    assert [entry.act for entry in read_audit_log(home)].count("retire") == 1


def test_an_archive_in_a_store_and_none_at_all(grown: Settings, tmp_path: Path, prefix: str) -> None:
    stored = retiring(correct.copied(grown, tmp_path / "stored"), raw_archive=f"{prefix}/archive")
    assert retire(stored, now=NOW).files == len(archived(stored)) == 2
    dropped = retiring(correct.copied(grown, tmp_path / "dropped"))
    assert vacuum(dropped, dry_run=False, now=NOW).raw.files == 2
    assert len(landed(dropped)) == 1
    assert correct.rows(dropped, "select distinct archived_to from raw_retirements") == [(None,)]


def test_without_a_retention_nothing_goes(grown: Settings) -> None:
    assert retire(grown, now=NOW).files == 0
    assert len(landed(grown)) == 3


def test_what_is_younger_or_changed_is_kept(home: Settings) -> None:
    assert retire(home, now=datetime(2023, 11, 15, tzinfo=UTC)).files == 0
    name = landed(home)[0]
    path = home.landing_path / "events/eu-west" / name
    path.write_bytes(path.read_bytes() + b"\n")
    assert retire(home, now=NOW).files == 1
    assert name in landed(home)


def test_a_file_that_was_set_aside_is_kept_for_its_release(home: Settings) -> None:
    name = f"events/eu-west/{landed(home)[0]}"
    path = home.landing_path / name
    LocalEvents(load_settings(home=home.home_path, max_rejects_per_file=3), "other").take_content(b"nonsense\n" * 30)
    (aside,) = read_quarantine(home)
    settle(home, datetime(2025, 6, 5, tzinfo=UTC))
    retire(home, now=NOW)
    assert Path(aside.source_file).name in landed(home)
    assert path.name not in landed(home)
    release_file(home, aside.source_file, reason="r", released_by="me")


def test_files_of_a_landing_folder_in_a_store(prefix: str, tmp_path: Path) -> None:
    home = load_settings(home=tmp_path / "home", landing=f"{prefix}/landing")
    source = tmp_path / "source/events/eu-west"
    source.mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl"):
        (source / name).write_text("{}\n")
    land_folder(tmp_path / "source", home.landing_uri)
    refresh_landing(home, is_full=True)
    assert len(landed(home)) == 2
    remove_landed(home, ["events/eu-west/a.jsonl"])
    assert landed(home) == ["b.jsonl"]
    assert [found.name for found in open_place(home.landing_uri).list()] == ["events/eu-west/b.jsonl"]


def test_an_archive_in_the_landing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ADTALLY_RAW_ARCHIVE lies in the landing folder"):
        load_settings(home=tmp_path / "home", raw_archive=tmp_path / "home/landing/old")


def test_days_of_a_raw_table(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two days of a partition, of which the batches that are in the ledger have read the first."""
    rows = [
        {"cluster": "eu", "source_topic": "ad-events", "source_partition": 0, "source_offset": n, "value": b"{}"}
        | {"ingested_at": moment, "ingested_date": moment.date()}
        for n, moment in [(0, OLD), (1, OLD), (2, OLD + timedelta(days=1))]
    ]
    Lake(home).append(RAW_EVENTS, pa.Table.from_pylist(rows, RAW_EVENTS.schema), Step.RAW_COPY)
    name = "kafka/eu/ad-events/0"
    plan = BatchPlan("local", 0, 1, 0, 0, 0, 0, 0, (), ranges=(PlannedRange(name, 0, 2),))
    monkeypatch.setattr(module, "read_plans", lambda *_: [plan])
    report = retire(home, now=NOW)
    assert report.raw_days == ["raw_events 2025-06-02"]
    assert correct.rows(home, "select source_offset from raw_events") == [(2,)]
    assert [path.split("/")[:2] for path in archived(home)] == [["raw_events", "ingested_date=2025-06-02"]]
    found = correct.rows(home, "select source_file, first_offset, end_offset, ingested_date from raw_retirements")
    assert found == [(name, 0, 2, date(2025, 6, 2))]
    query = TopicQuery("q", frozenset(), {name: 0}, {name: 3})  # by whose checkpoint the table has all offsets
    monkeypatch.setattr(raw, "read_topic_queries", lambda *_: {query_key(name): query})
    snapshot = Lake(home).pin(RAW_EVENTS)
    assert RawTable(home, "events", snapshot).complete_spans(name, from_offset=0) == [(2, 3)]
    assert retire(home, now=NOW).raw_days == []
