from __future__ import annotations

import csv
import gzip
import hashlib
import json
import shutil
from pathlib import Path

import pytest

import samples
from samples.make_samples import make
from services.simulator.truth import Truth
from tests.services.simulator.recount import offered_lines, recount_billing, recount_events, recount_orders
from tests.services.simulator.test_simulate import assert_credit_equals_a_recount

SAMPLES = Path(str(samples.__file__)).parent
HEADER = ("timestamp", "policy", "campaign", "item_id", "position", "click", "user_segment")


@pytest.fixture(scope="module")
def landed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "landing"
    assert samples.land(folder) == SAMPLES / "truth.json"
    return folder


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
