"""The billing ledger: charges, credits and adjustments by hand, and by any sequence of what can change a day."""

from __future__ import annotations

import json
import shutil
import signal
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from killed import run_code

from spark_jobs.billing import job as module
from spark_jobs.billing.job import BillingLine, bill, nanos_to_micros
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.locks import CORRECTIONS, exclusive
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import BATCH_LEDGER, BILLING_LINES, CHAIN_COLUMNS, MINUTE_METRICS, RESTATEMENTS, TABLES, TRAFFIC_REVIEWS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.steps import CRASH_VARIABLE, Step

ROOT = Path(__file__).parents[3]
DAY = date(2025, 6, 2)
NOW = datetime(2025, 6, 10, 8, tzinfo=UTC)


@dataclass
class Lake:
    """A lakehouse written by hand: batches, corrections, closings."""

    settings: Settings
    batch: int = 0
    received: datetime = datetime(2025, 6, 2, 10, tzinfo=UTC)
    rows: list[dict[str, Any]] = field(default_factory=list)  # increments, as a recount would have them

    def _append(self, table: Any, rows: list[dict[str, Any]]) -> None:
        write_deltalake(self.settings.table_uri(table.name), pa.Table.from_pylist(rows, table.schema), mode="append")

    def increments(self, *spends: tuple[str, int], day: date = DAY, run: str | None = None, batch: int | None = None) -> None:
        """Increments of (campaign, nanos) at 10:05 of a day; clicks go with the sign of the money."""
        rows = [
            {
                "record_uuid": uuid.uuid4().hex,
                "event_minute": datetime(day.year, day.month, day.day, 10, 5, tzinfo=UTC),
                "event_date": day,
                "region": "eu",
                "campaign_id": campaign.partition("/")[0],
                "ad_id": "a-1",
                "store_id": campaign.partition("/")[2] or "s-1",
                "currency": "EUR",
                **dict.fromkeys(("impressions", "invalid_impressions", "invalid_clicks", "invalid_spend_nanos"), 0),
                "clicks": 1 if nanos > 0 else -1,
                "spend_nanos": nanos,
                "_query_id": "q",
                "_batch_id": self.batch if batch is None else batch,
                "_run_id": run,
            }
            for campaign, nanos in spends
        ]
        self._append(MINUTE_METRICS, rows)
        self.rows += rows

    def book(self, day: date = DAY) -> None:
        """The ledger's row that makes the batch complete."""
        hour = datetime(day.year, day.month, day.day, 10, tzinfo=UTC)
        row = {"stream": "events", "source": "files", "region": "eu", "event_hour": hour, "offered": 1, "accepted": 1}
        times = {"max_received_at": self.received, "ingested_at": self.received}
        self._append(BATCH_LEDGER, [{**row, **times, "_query_id": "q", "_batch_id": self.batch}])
        self.batch += 1

    def ingest(self, *spends: tuple[str, int], day: date = DAY) -> None:
        """A whole batch."""
        self.increments(*spends, day=day)
        self.book(day)

    def correct(self, kind: str, *spends: tuple[str, int], run: str, day: date = DAY, rule_set: str | None = None) -> None:
        """A correction of the first batch's increments, and what it says of itself."""
        self.increments(*spends, day=day, run=run, batch=0)
        self.explain(kind, *spends, run=run, day=day, rule_set=rule_set)

    def explain(self, kind: str, *spends: tuple[str, int], run: str, day: date = DAY, rule_set: str | None = None) -> None:
        hour = datetime(day.year, day.month, day.day, 10, tzinfo=UTC)
        sums: Counter[str] = Counter()
        for campaign, nanos in spends:
            sums[campaign.partition("/")[0]] += nanos
        row = {"run_id": run, "kind": kind, "cause": "x", "event_hour": hour, "currency": "EUR", "rule_set": rule_set}
        self._append(RESTATEMENTS, [{**row, "campaign_id": name, "spend_nanos": nanos} for name, nanos in sums.items()])

    def come_to(self, text: str) -> None:
        """The source goes on to a time: hours before it close. Its batch counts nothing."""
        self.received = datetime.fromisoformat(text).replace(tzinfo=UTC)
        row = {"stream": "events", "source": "files", "region": "eu", "event_hour": None, "offered": 0, "accepted": 0}
        times = {"max_received_at": self.received, "ingested_at": self.received}
        self._append(BATCH_LEDGER, [{**row, **times, "_query_id": "q", "_batch_id": self.batch}])
        self.batch += 1

    def close(self) -> None:
        """2 June closes: its last hour and the grace are over."""
        self.come_to("2025-06-03T00:15:00")

    def bill(self, run: str = "billing") -> list[tuple[str, str, str, int]]:
        """Bill; campaign, type, reason and amount of the lines."""
        return [brief(line) for line in bill(self.settings, run_id=run, now=NOW).lines]

    def lines(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = DeltaTable(self.settings.table_uri(BILLING_LINES.name)).to_pyarrow_table().to_pylist()
        return rows

    def version(self) -> int | None:
        return DeltaLog(self.settings.table_uri(BILLING_LINES.name)).latest_version()

    def recount(self) -> dict[tuple[Any, ...], int]:
        """Micros by key, rounded by other means than the job's."""
        sums: dict[tuple[Any, ...], int] = defaultdict(int)
        for row in self.rows:
            sums[row["event_date"], row["campaign_id"], row["store_id"], row["currency"]] += row["spend_nanos"]
        return {key: int((Decimal(n) / 1000).quantize(Decimal(1), ROUND_HALF_UP)) for key, n in sums.items()}

    def billed(self) -> dict[tuple[Any, ...], int]:
        sums: Counter[tuple[Any, ...]] = Counter()
        for row in self.lines():
            sums[row["event_date"], row["campaign_id"], row["store_id"], row["currency"]] += row["amount_micros"]
        return dict(sums)


def brief(line: BillingLine) -> tuple[str, str, str, int]:
    return line.campaign_id, line.line_type, line.reason, line.amount_micros


def made(home: Path) -> Lake:
    settings = load_settings(home=home)
    ensure_tables(settings)
    return Lake(settings)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return made(tmp_path / "home")


@pytest.mark.parametrize(
    ("nanos", "micros"), [(0, 0), (499, 0), (500, 1), (1499, 1), (1500, 2), (-499, 0), (-500, -1), (-1500, -2)]
)
def test_half_away_from_zero(nanos: int, micros: int) -> None:
    assert nanos_to_micros(nanos) == micros


def test_a_day_is_charged_when_its_last_hour_closes(lake: Lake) -> None:
    lake.ingest(("c1", 2_500_000), ("c2", 499))
    assert lake.bill() == []
    lake.come_to("2025-06-03T00:14:59.999999")
    assert lake.bill() == []
    lake.close()
    assert lake.bill("r1") == [("c1", "charge", "day_closed", 2500), ("c2", "charge", "day_closed", 0)]
    assert lake.bill() == []
    first = lake.lines()[0]
    assert (first["run_id"], first["spend_nanos"], first["billed_micros"], first["clicks"]) == ("r1", 2_500_000, 2500, 1)
    assert first["billed_at"] == NOW


def test_no_home_is_no_bill_and_none_is_made(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path / "none")
    assert bill(settings).lines == []
    assert not settings.home_path.exists()


def test_a_campaign_without_spend_has_no_line_until_it_has_spend(lake: Lake) -> None:
    lake.ingest(("free", 0), ("c1", 1000))
    lake.close()
    assert lake.bill() == [("c1", "charge", "day_closed", 1)]
    lake.ingest(("free", 7000))
    assert lake.bill() == [("free", "adjustment", "late", 7)]


def test_what_changes_later_is_a_line_with_its_reason_run_and_rules(lake: Lake) -> None:
    lake.ingest(("c1", 10_000_000), ("c2", 5_000_000))
    lake.close()
    lake.bill("r1")
    lake.ingest(("c1", 1_000_000))
    lake.correct("review", ("c1", -3_000_000), run="review-1", rule_set="f" * 64)
    lake.correct("repair", ("c1", 500_000), run="repair-1")
    lake.correct("backfill", ("c1", -100_000), run="backfill-1")
    row = {"run_id": "review-0", "event_hour": datetime(2025, 6, 2, 10, tzinfo=UTC), "rule_set": "e" * 64, "reviewed_at": NOW}
    lake._append(TRAFFIC_REVIEWS, [row])
    report = bill(lake.settings, run_id="r2", now=NOW)
    assert [(brief(line)[1:], line.run_id, line.rule_set) for line in report.lines] == [
        (("adjustment", "late", 1000), "r2", "e" * 64),
        (("credit", "invalid_traffic", -3000), "review-1", "f" * 64),
        (("adjustment", "repair", 500), "repair-1", "e" * 64),
        (("credit", "backfill", -100), "backfill-1", "e" * 64),
    ]
    assert [line.billed_micros for line in report.lines] == [11_000, 8000, 8500, 8400]
    assert [line.spend_nanos for line in report.lines] == [11_000_000, 8_000_000, 8_500_000, 8_400_000]
    assert {line.clicks for line in report.lines} == {1 + 1 - 1 + 1 - 1}
    assert lake.bill() == []
    assert len({row["line_id"] for row in lake.lines()}) == 6


def test_what_was_found_before_the_close_is_in_the_charge(lake: Lake) -> None:
    lake.ingest(("c1", 10_000))
    lake.correct("review", ("c1", -10_000), run="review-1")
    lake.close()
    assert lake.bill() == [("c1", "charge", "day_closed", 0)]
    lake.correct("review", ("c1", 4000), run="review-2")
    assert lake.bill() == [("c1", "adjustment", "invalid_traffic", 4)]


def test_changes_that_cancel_are_two_lines(lake: Lake) -> None:
    lake.ingest(("c1", 10_000))
    lake.close()
    lake.bill()
    lake.ingest(("c1", 2000))
    lake.correct("review", ("c1", -2000), run="review-1")
    assert lake.bill() == [("c1", "adjustment", "late", 2), ("c1", "credit", "invalid_traffic", -2)]


def test_a_change_is_told_once(lake: Lake) -> None:
    """What the review took was posted: the next line is of what came since."""
    lake.ingest(("c1", 10_000))
    lake.close()
    lake.bill()
    lake.correct("review", ("c1", -1000), run="review-1")
    assert lake.bill() == [("c1", "credit", "invalid_traffic", -1)]
    lake.ingest(("c1", 2000))
    assert lake.bill() == [("c1", "adjustment", "late", 2)]


def test_a_run_that_repaired_and_reviewed_a_campaign_has_a_line_for_each(lake: Lake) -> None:
    lake.ingest(("c1", 10_000))
    lake.close()
    lake.bill()
    lake.correct("repair", ("c1", 3000), run="run-1")
    lake.correct("review", ("c1", -1000), run="run-1", rule_set="f" * 64)
    assert lake.bill() == [("c1", "credit", "invalid_traffic", -1), ("c1", "adjustment", "repair", 3)]


def test_fractions_of_a_micro_wait_until_they_are_one(lake: Lake) -> None:
    """1,400 nanos are billed as 1 micro; with 99 more it stays 1, with 1 more it is 1,500 and so 2."""
    lake.ingest(("c1", 1400))
    lake.close()
    assert lake.bill() == [("c1", "charge", "day_closed", 1)]
    lake.ingest(("c1", 99))
    assert lake.bill() == []
    lake.ingest(("c1", 1))
    assert lake.bill() == [("c1", "adjustment", "late", 1)]
    assert lake.bill() == []


def test_increments_that_a_repair_took_out_are_credited_as_a_repair(lake: Lake) -> None:
    lake.ingest(("c1", 1000))
    lake.ingest(("c1", 1000))
    lake.close()
    lake.bill()
    uid = lake.rows.pop()["record_uuid"]
    DeltaTable(lake.settings.table_uri(MINUTE_METRICS.name)).delete(f"record_uuid = '{uid}'")
    assert lake.bill() == [("c1", "credit", "repair", -1)]
    assert lake.billed() == lake.recount()


def test_half_a_batch_is_not_billed(lake: Lake) -> None:
    lake.ingest(("c1", 1000))
    lake.close()
    lake.bill()
    lake.increments(("c1", 5000))
    lake.ingest(("c1", 2000), day=DAY + timedelta(days=5))  # others go on meanwhile
    lake.batch += 1
    assert lake.bill() == []
    lake.increments(("c2", 1000))
    assert lake.bill() == []
    lake.book()
    assert lake.bill() == [("c2", "adjustment", "late", 1)]


def test_the_ledger_row_alone_brings_its_day_back(lake: Lake) -> None:
    """The increments were read by an earlier run, which posted other lines, and their batch was not complete then."""
    lake.ingest(("c1", 1000))
    lake.close()
    lake.increments(("c1", 5000))
    assert lake.bill() == [("c1", "charge", "day_closed", 1)]
    lake.book()
    lake.ingest(("c2", 1000), day=DAY + timedelta(days=5))
    assert lake.bill() == [("c1", "adjustment", "late", 5)]


def test_a_correction_under_way_is_waited_for(lake: Lake) -> None:
    """Its increments are there, its restatements are not: nobody can say why yet."""
    lake.ingest(("c1", 10_000), ("c2", 1000))
    lake.close()
    lake.bill()
    lake.increments(("c1", -4000), run="review-1", batch=0)
    lake.ingest(("c2", 1000))
    pending = lake.settings.home_path / "corrections" / "token"
    pending.mkdir(parents=True)
    (pending / "manifest.json").write_text('{"token": "token"}')
    with exclusive(lake.settings, CORRECTIONS):  # by another process, which lives
        assert lake.bill() == [("c2", "adjustment", "late", 1)]
    lake.explain("review", ("c1", -4000), run="review-1")
    shutil.rmtree(pending)
    assert lake.bill() == [("c1", "credit", "invalid_traffic", -4)]
    assert lake.bill() == []


def test_a_run_that_nobody_explains_is_a_repair(lake: Lake) -> None:
    lake.ingest(("c1", 10_000))
    lake.close()
    lake.bill()
    lake.increments(("c1", -4000), run="gone", batch=0)
    assert lake.bill() == [("c1", "credit", "repair", -4)]


def test_stores_and_currencies_are_apart(lake: Lake) -> None:
    lake.ingest(("c1/s1", 600), ("c1/s2", 600))
    lake.increments(("c1/s1", 600))
    lake.rows[-1]["currency"] = "USD"
    table = DeltaTable(lake.settings.table_uri(MINUTE_METRICS.name))
    table.update(updates={"currency": "'USD'"}, predicate=f"record_uuid = '{lake.rows[-1]['record_uuid']}'")
    lake.book()
    lake.close()
    bill(lake.settings, now=NOW)
    assert sorted((row["store_id"], row["currency"], row["amount_micros"]) for row in lake.lines()) == [
        ("s1", "EUR", 1),
        ("s1", "USD", 1),
        ("s2", "EUR", 1),
    ]


def test_only_days_that_changed_are_looked_at(lake: Lake) -> None:
    for back in range(5):
        lake.ingest(("c1", 1000), day=DAY - timedelta(days=back))
    lake.close()
    assert bill(lake.settings, now=NOW).days == 5
    assert bill(lake.settings, now=NOW).days == 0
    lake.ingest(("c1", 1000), day=DAY - timedelta(days=3))
    lake.ingest(("c1", 1000), day=DAY + timedelta(days=1))
    assert bill(lake.settings, now=NOW).days == 1
    lake.come_to("2025-06-04T00:15:00")
    report = bill(lake.settings, now=NOW)
    assert (report.days, [line.line_type for line in report.lines]) == (1, ["charge"])


def test_a_compaction_is_no_change_and_a_lost_log_no_loss(lake: Lake) -> None:
    lake.ingest(("c1", 1000))
    lake.ingest(("c1", 1000))
    lake.close()
    lake.bill()
    DeltaTable(lake.settings.table_uri(MINUTE_METRICS.name)).optimize.compact()
    assert bill(lake.settings, now=NOW).days == 0
    lake.ingest(("c1", 3000))
    log = Path(lake.settings.table_uri(MINUTE_METRICS.name)) / "_delta_log"
    DeltaTable(lake.settings.table_uri(MINUTE_METRICS.name)).create_checkpoint()
    for commit in sorted(log.glob("*.json"))[:-1]:
        commit.unlink()
    assert lake.bill() == [("c1", "adjustment", "late", 3)]


def test_a_billed_day_stays_closed_when_a_slow_source_appears(lake: Lake) -> None:
    lake.ingest(("c1", 1000))
    lake.close()
    lake.bill()
    row = {"stream": "events", "source": "files", "region": "us", "event_hour": None, "offered": 1, "accepted": 1}
    at = datetime(2025, 6, 1, tzinfo=UTC)
    lake._append(BATCH_LEDGER, [{**row, "max_received_at": at, "ingested_at": at, "_query_id": "q", "_batch_id": 99}])
    lake.ingest(("c1", 2000))
    assert lake.bill() == [("c1", "adjustment", "late", 2)]


def test_lines_of_a_run_stand_in_one_commit_and_an_idle_run_makes_none(lake: Lake) -> None:
    lake.ingest(("c1", 1000), ("c2", 1000))
    lake.close()
    before = lake.version()
    assert before is not None
    lake.bill()
    assert lake.version() == before + 1
    lake.bill()
    assert lake.version() == before + 1


@pytest.mark.parametrize(("moment", "lines"), [("before", 0), ("after", 2)])
def test_a_killed_run_has_posted_all_or_nothing(lake: Lake, moment: str, lines: int) -> None:
    lake.ingest(("c1", 1000), ("c2", 1000))
    lake.close()
    code = "from spark_jobs.config import load_settings; from spark_jobs.billing.job import bill; bill(load_settings())"
    point = f"{moment}:{Step.BILLING_LINES}:{(lake.version() or 0) + 1}"
    assert run_code(code, **{"ADTALLY_HOME": str(lake.settings.home_path), CRASH_VARIABLE: point}) == -signal.SIGKILL
    assert len(lake.lines()) == lines
    assert len(lake.bill()) == 2 - lines
    assert lake.billed() == lake.recount()


def test_the_place_is_noted_when_nothing_is_billed_for_long(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMMITS_UNREAD", 3)
    lake.ingest(("c1", 1000))
    lake.close()
    lake.bill()
    before = lake.version()
    assert before is not None
    for _ in range(2):
        lake.ingest(("free", 0))
    assert (bill(lake.settings, now=NOW).days, lake.version()) == (1, before)
    lake.ingest(("free", 0))
    assert (bill(lake.settings, now=NOW).days, lake.version()) == (1, before + 1)
    assert (bill(lake.settings, now=NOW).days, lake.version()) == (0, before + 1)


def test_an_older_table_without_invalid_spend_is_billed(lake: Lake) -> None:
    """Tables of an older adtally get their columns; what they held reads as null."""
    uri = Path(lake.settings.table_uri(MINUTE_METRICS.name))
    lake.ingest(("c1", 1000))
    rows = DeltaTable(str(uri)).to_pyarrow_table().drop_columns(["invalid_spend_nanos"])
    write_deltalake(str(uri), rows, mode="overwrite", schema_mode="overwrite")
    assert "invalid_spend_nanos" not in DeltaTable(str(uri)).to_pyarrow_table().column_names
    lake.close()
    assert lake.bill() == [("c1", "charge", "day_closed", 1)]
    assert lake.lines()[0]["invalid_spend_nanos"] == 0


def test_every_line_is_a_row_of_its_table() -> None:
    assert [*BillingLine.__dataclass_fields__, *CHAIN_COLUMNS] == TABLES["billing_lines"].schema.names


MONEY = st.integers(-3_000, 3_000)
STEP = st.one_of(
    st.tuples(st.just("ingest"), st.integers(0, 2), st.sampled_from(["c1", "c2"]), st.integers(0, 3_000)),
    st.tuples(st.sampled_from(["review", "repair", "backfill"]), st.integers(0, 2), st.sampled_from(["c1", "c2"]), MONEY),
    st.tuples(st.just("bill"), st.just(0), st.just(""), st.just(0)),
    st.tuples(st.just("close"), st.integers(0, 2), st.just(""), st.just(0)),
)


@hypothesis_settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEP, min_size=3, max_size=9))
def test_lines_sum_to_the_rounded_recount_after_any_sequence(steps: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    lake = made(tmp_path_factory.mktemp("billing") / "home")
    lake.ingest(("c1", 1), day=DAY)
    for number, (what, days, campaign, nanos) in enumerate(steps):
        day = DAY + timedelta(days=days)
        if what == "ingest":
            lake.ingest((campaign, nanos), day=day)
        elif what == "bill":
            lake.bill()
        elif what == "close":
            lake.come_to(f"{day + timedelta(days=1)}T00:15:00")
        else:
            lake.increments((campaign, nanos), day=day, run=f"run-{number}")
            lake.book(day)
            lake.explain(what, (campaign, nanos), run=f"run-{number}", day=day)
    lake.come_to("2025-06-09T00:15:00")
    lake.bill()
    assert {key: value for key, value in lake.billed().items() if value} == {k: v for k, v in lake.recount().items() if v}
    version = lake.version()
    assert lake.bill() == []
    assert lake.version() == version
    for row in lake.lines():
        assert row["amount_micros"] or row["line_type"] == "charge"
        assert sum(json.loads(row["spend_parts"]).values()) == pytest.approx(row["spend_nanos"], abs=500 * 10)
