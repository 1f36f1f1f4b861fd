from __future__ import annotations

import csv
import gzip
import hashlib
import json
import shutil
from datetime import date, datetime, timedelta
from pathlib import Path

import pytest

import samples
from samples.make_samples import make
from services.simulator.truth import Truth
from tests.services.simulator.recount import accepted_events, offered_lines, recount_billing, recount_events, recount_orders
from tests.services.simulator.test_simulate import assert_credit_equals_a_recount

SAMPLES = Path(str(samples.__file__)).parent
HEADER = ("timestamp", "policy", "campaign", "item_id", "position", "click", "user_segment")


@pytest.fixture(scope="module")
def landed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "landing"
    samples.land(folder)
    return folder


@pytest.mark.parametrize("weeks", [1, 366])
def test_shifted_truth_equals_a_recount(tmp_path: Path, weeks: int) -> None:
    """Also over the end of a year and a leap day; what moves is the days and nothing else."""
    samples.land(tmp_path, weeks)
    truth = samples.read_truth(weeks)
    accounting, campaign_hours = recount_events(tmp_path)
    assert truth["accounting"] == accounting
    assert truth["campaign_hours"] == campaign_hours
    assert truth["orders"] == recount_orders(tmp_path)
    assert truth["billing"] == recount_billing(campaign_hours, tmp_path)
    as_it_is = samples.read_truth()
    assert {name: truth[name] for name in ("totals", "orders", "attribution")} == {
        name: as_it_is[name] for name in ("totals", "orders", "attribution")
    }
    week = timedelta(weeks=weeks)
    for row, moved in zip(as_it_is["billing"], truth["billing"], strict=True):
        assert date.fromisoformat(row["event_date"]) + week == date.fromisoformat(moved["event_date"])
    for entry in json.loads((SAMPLES / "files.json").read_text()):
        assert (tmp_path / entry["path"]).stat().st_mtime_ns == (entry["mtime_ms"] + weeks * 7 * 86_400_000) * 1_000_000


@pytest.mark.parametrize(
    ("now", "last_day"),
    [
        ("2019-12-01T00:00:00Z", "2019-11-30"),
        ("2026-11-28T23:00:00Z", "2026-11-21"),  # a Saturday
        ("2026-11-29T05:59:59Z", "2026-11-21"),
        ("2026-11-29T06:00:00Z", "2026-11-28"),
        ("2026-12-06T05:59:59Z", "2026-11-28"),
    ],
)
def test_the_week_is_the_last_that_is_over(now: str, last_day: str) -> None:
    weeks = samples.weeks_until(datetime.fromisoformat(now))
    last = samples.START + timedelta(weeks=weeks, days=samples.DAYS - 1)
    assert f"{last:%Y-%m-%d}" == last_day
    assert max(row["event_date"] for row in samples.read_truth(weeks)["billing"]) == last_day


def test_one_campaign_overspends() -> None:
    """By the budgets of campaigns.csv, and on the last day, so that a person sees it first."""
    with (SAMPLES / "landing" / "campaigns" / "campaigns.csv").open(newline="") as stream:
        budgets = {row["campaign_id"]: int(row["daily_budget_micros"]) for row in csv.DictReader(stream)}
    over = [row for row in samples.read_truth()["billing"] if row["spend_micros"] > budgets[row["campaign_id"]]]
    assert {(row["campaign_id"], row["event_date"]) for row in over} == {("women-bts", "2019-11-29"), ("women-bts", "2019-11-30")}


def test_everything_in_the_samples_has_a_name(landed: Path) -> None:
    with (landed / "names" / "names.csv").open(newline="") as stream:
        named = {(row["kind"], row["id"]) for row in csv.DictReader(stream) if row["name"]}
    seen = set()
    for event in accepted_events(landed).values():
        seen |= {(kind, event[f"{kind}_id"]) for kind in ("campaign", "ad", "store")}
    assert seen == named


def test_committed_truth_equals_a_recount(landed: Path) -> None:
    truth = Truth.load(SAMPLES / "truth.json")
    accounting, campaign_hours = recount_events(landed)
    assert truth.accounting == accounting
    assert truth.campaign_hours == campaign_hours
    assert truth.orders == recount_orders(landed)
    assert truth.billing == recount_billing(campaign_hours, landed)
    assert_credit_equals_a_recount(landed, truth)


def test_every_real_event_is_accepted_once() -> None:
    totals = Truth.load(SAMPLES / "truth.json").totals
    shown, clicked = (totals[name] + totals[f"invalid_{name}"] for name in ("impressions", "clicks"))
    assert (shown, clicked, totals["accepted"]) == (60_000, 287, 60_287)
    assert totals["offered"] == sum(totals[name] for name in ("accepted", "duplicate", "conflict", "rejected"))
    assert all(totals[name] > 0 for name in ("duplicate", "conflict", "rejected", "late", "unpriced", "bot_clicks"))


def test_files_are_those_of_the_listing(landed: Path) -> None:
    listed = json.loads((SAMPLES / "files.json").read_text())
    stamps = [entry["mtime_ms"] for entry in listed]
    assert stamps == sorted(set(stamps))
    assert {str(path.relative_to(landed)) for path in landed.rglob("*") if path.is_file()} == {entry["path"] for entry in listed}
    for entry in listed:
        path = landed / entry["path"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        assert path.stat().st_mtime_ns == entry["mtime_ms"] * 1_000_000


def test_landing_again_leaves_the_files_alone(tmp_path: Path) -> None:
    samples.land(tmp_path)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    samples.land(tmp_path)
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


def test_samples_stay_small() -> None:
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < 5_000_000


def test_making_is_reproducible_and_its_truth_holds(tmp_path: Path) -> None:
    """On a small CSV of the same shape; the real one is not part of the repository."""
    source = tmp_path / "impressions.csv.gz"
    with gzip.open(source, "wt", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(HEADER)
        for number in range(4_000):
            stamp = f"2019-11-{24 + number % 7} {number // 7 % 24:02d}:{number % 60:02d}:07.{number:06d}+00:00"
            policy, campaign = ("bts", "random")[number % 2], ("all", "men", "women")[number % 3]
            writer.writerow([stamp, policy, campaign, number % 34, 1 + number % 3, int(number % 50 == 0), f"{number % 5:012x}"])
    first = make(source, tmp_path / "first")
    assert make(source, tmp_path / "second") == first
    for path in (tmp_path / "first").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))
    landing = tmp_path / "first" / "landing"
    assert recount_events(landing) == (first.accounting, first.campaign_hours)
    assert recount_orders(landing) == first.orders
    assert recount_billing(first.campaign_hours, landing) == first.billing
    assert_credit_equals_a_recount(landing, first)
    assert first.totals["accepted"] == 4_000 + 80
    shutil.rmtree(tmp_path / "first" / "landing" / "orders")
    assert len(offered_lines(landing, "events")) == first.totals["offered"]
