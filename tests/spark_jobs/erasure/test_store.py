"""Erasure with the lakehouse, the landing folder and the rules in an object store: as on a disk, from any machine."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime
from pathlib import Path

import correct
import pytest
import sparkless
from lake import event, lines, order

from spark_jobs.attribution.job import attribute
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.erasure.job import erase, prove
from spark_jobs.erasure.suppression import erasure_place
from spark_jobs.errors import ConfigurationError
from spark_jobs.ingest.files.backlog import read_landing
from spark_jobs.lake.landing_view import refresh_landing
from spark_jobs.lake.places import open_place
from spark_jobs.lake.writes import ensure_tables

pytestmark = pytest.mark.homes
ANNA, NOW = "user-anna-0001", datetime(2025, 6, 10, tzinfo=UTC)


def _settings(home: Path, prefix: str, key: Path) -> Settings:
    places = {name: f"{prefix}/{name}" for name in ("lakehouse", "landing", "rules")}
    return load_settings(home=home, erasure_key_file=key, **places)


def _ingest(settings: Settings) -> list[tuple[int, int, int]]:
    refresh_landing(settings, is_full=True)
    reports = [*sparkless.ingest(settings, "events"), *sparkless.ingest(settings, "orders")]
    return [(report.accepted, report.duplicate, report.conflict) for report in reports]


def test_erased_in_a_store_and_known_to_every_machine(prefix: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o644)
    settings = _settings(tmp_path / "first", prefix, key)
    ensure_tables(settings)
    landing = open_place(settings.landing_uri)
    header = "campaign_id,store_id,billing_model,daily_budget_micros,currency,valid_from,valid_to"
    landing.write("campaigns/c.csv", f"{header}\nc-cpm,s-1,cpm,1000000,EUR,2000-01-01T00:00:00Z,\n".encode())
    first = [event(f"e{n}", user_id=(ANNA, "user-bert-0002")[n % 2]) for n in range(6)]
    landing.write("events/eu/1.jsonl", lines([*first, event("x", user_id=ANNA, currency="XXX")]))
    landing.write("events/eu/2.jsonl.gz", gzip.compress(lines([first[0], event("e1", user_id=ANNA)])))
    landing.write("orders/eu/1.jsonl", lines([order("o1", user_id=ANNA)]))
    open_place(settings.rules_uri).write("invalid_traffic.toml", b'list_file = "users.txt"\n')
    open_place(settings.rules_uri).write("users.txt", f"{ANNA}\n".encode())
    assert _ingest(settings) == [(6, 1, 1), (1, 0, 0)]
    attribute(settings)
    before = correct.contents(settings)["minute_metrics"]

    with pytest.raises(ConfigurationError, match="others can read the key"):
        erase(settings, [ANNA], now=NOW)
    key.chmod(0o600)
    (run,) = erase(settings, [ANNA], now=NOW)
    receipt = prove(settings, run, now=NOW)
    assert (receipt.files_rewritten, receipt.totals_equal) == (4, True)
    assert open_place(settings.rules_uri).read("users.txt") == f"{run.tokens[ANNA]}\n".encode()
    assert erasure_place(settings).find("key") is None
    assert correct.contents(settings)["minute_metrics"] == before
    assert reconcile(settings, None).differences == []
    assert read_landing(settings).ignored_files == 0
    assert _ingest(settings) == []

    # another machine, which knows nothing but the places and the key
    other = _settings(tmp_path / "second", prefix, key)
    landing.write("events/eu/3.jsonl", lines([event("e0", user_id=ANNA), event("e9", user_id=ANNA), first[1]]))
    assert reconcile(other, None).differences == []
    assert _ingest(settings) == [(1, 2, 0)]
    assert {user for (user,) in correct.rows(other, "select user_id from events")} == {run.tokens[ANNA], "user-bert-0002"}
    assert reconcile(other, None).differences == []
