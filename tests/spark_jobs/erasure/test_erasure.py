"""Erasure, end to end: one token replaces the id everywhere, and nothing that counts changes."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

import correct
import pytest
from lake import campaigns, event, land, lines, order
from sparkless import ingest

from spark_jobs.attribution.job import attribute
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.erasure.job import erase, prove
from spark_jobs.lake.writes import ensure_tables

ANNA, BERT, CARA = "user-anna-0001", "ünï-bert@example.org", "user-cara-0003"
NOW = datetime(2025, 6, 10, tzinfo=UTC)


def _count(settings: Settings, needle: str) -> int:
    return len(correct.rows(settings, f"select event_id from events where user_id = '{needle}'"))


def make_home(home: Path) -> Settings:
    """A home in which Anna, Bert and Cara have events and orders, resends, conflicts, rejects and broken lines."""
    settings = load_settings(home=home)
    ensure_tables(settings)
    campaigns(settings)
    first = [event(f"e-{n}", user_id=(ANNA, BERT, CARA)[n % 3], event_type="click" if n % 2 else "impression") for n in range(12)]
    land(settings, "events/eu/a.jsonl", lines(first))
    land(
        settings,
        "events/eu/b.jsonl.gz",
        gzip.compress(
            lines([*first[:3], event("e-1", user_id=BERT, price_micros=9), event("e-0", user_id=CARA)])
            + json.dumps(event("e-20", user_id=ANNA)).replace("anna", "\\u0061nna").encode()
            + b"\n"
            + lines([event("e-21", user_id=ANNA, currency="XXX"), event("e-22", user_id=CARA, note=f"was {ANNA} before")])
            + f'{{"event_id": "broken", "user_id": "{ANNA}"\n'.encode()
            + b"\xff\xfe "
            + ANNA.encode()
            + b" \n"
        ),
    )
    placed = [order(f"o-{n}", user_id=(ANNA, BERT, CARA)[n % 3]) for n in range(6)]
    land(settings, "orders/eu/a.jsonl", lines([*placed, order("o-0", user_id=ANNA, total_micros=1), placed[1]]))
    land(
        settings,
        "orders/eu/b.jsonl",
        lines([order("o-3", user_id=ANNA, status="cancelled"), order("o-9", user_id=ANNA, status="x")]),
    )
    for stream in ("events", "orders"):
        ingest(settings, stream, files_per_batch=1)
    attribute(settings)
    return settings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The home, made once."""
    return make_home(tmp_path_factory.mktemp("made") / "home")


@pytest.fixture
def home(made: Settings, tmp_path: Path) -> Settings:
    """A copy to work on."""
    return correct.copied(made, tmp_path / "home")


def test_erased_everywhere_and_nothing_that_counts_changes(home: Settings) -> None:
    assert reconcile(home, None).differences == []
    before = correct.contents(home)
    (run,) = erase(home, [ANNA], now=NOW)
    receipt = prove(home, run, now=NOW)
    assert receipt.totals_equal
    after = correct.contents(home)
    token = run.tokens[ANNA]
    assert len(after["events"]) == len(before["events"])
    assert {name: before[name] == after[name] for name in ("minute_metrics", "batch_ledger")} == {
        "minute_metrics": True,
        "batch_ledger": True,
    }
    assert _count(home, ANNA) == 0
    assert _count(home, token) > 4
    for path in home.home_path.rglob("*"):
        if path.is_file() and path.suffix not in (".parquet", ".gz"):
            assert ANNA.encode() not in path.read_bytes(), path
    assert reconcile(home, None).differences == []
