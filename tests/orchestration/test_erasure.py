"""adtally erase and the asset erased_people, on a home with marts."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import correct
import dagster as dg
import lake
import pytest
from sparkless import ingest
from terminal import Adtally

from orchestration.assets.storage import erased_people
from orchestration.marts import build_marts, query_marts
from orchestration.schedules import erasure_schedule
from spark_jobs.attribution.job import attribute
from spark_jobs.config import Settings, load_settings
from spark_jobs.erasure.job import DUE_SOON, queue_erasure
from spark_jobs.lake.acts import read_audit_log
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.health import read_signal

pytestmark = pytest.mark.homes
ANNA = "user-anna-0001"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A home with clicks, orders, credits and marts."""
    settings = load_settings(home=tmp_path_factory.mktemp("made") / "home")
    ensure_tables(settings)
    lake.campaigns(settings)
    users = (ANNA, "user-bert-0002")
    clicks = [lake.event(f"c{n}", event_type="click", campaign_id="c-cpc", user_id=users[n % 2]) for n in range(6)]
    lake.land(settings, "events/eu/1.jsonl", clicks)
    lake.land(settings, "orders/eu/1.jsonl", [lake.order("o1", user_id=ANNA), lake.order("o2", user_id="user-bert-0002")])
    for stream in ("events", "orders"):
        ingest(settings, stream)
    attribute(settings)
    build_marts(settings)
    return settings


@pytest.fixture
def home(made: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A copy of it, which commands and assets take for their own."""
    shutil.copytree(made.home_path, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADTALLY_HOME", str(tmp_path / "home"))
    return load_settings(home=tmp_path / "home")


def _users(settings: Settings) -> set[str]:
    return {user for (user,) in correct.rows(settings, "select user_id from events union select user_id from attributed_orders")}


MARTS = {
    "fct_campaign_day": "select * exclude (event_date), event_date from fct_campaign_day",
    "fct_attribution_credits": "select order_id, model, campaign_id, credit_micros from fct_attribution_credits",
    "fct_user_frequency": "select * from fct_user_frequency",
}


def _marts(settings: Settings) -> dict[str, Any]:
    return {name: sorted(map(repr, query_marts(settings, sql)[1])) for name, sql in MARTS.items()}


def test_erased_with_its_marts(home: Settings, adtally: Adtally) -> None:
    before = _marts(home)
    assert ANNA in repr(query_marts(home, "select distinct user_id from fct_attribution_credits")[1])
    done = adtally("erase", "--user", ANNA, "--yes")
    assert (done.status, done.err) == (0, "")
    assert "all totals are as before; the recount agrees" in done.out
    assert ANNA not in done.out
    assert ANNA not in _users(home)
    assert _marts(home) == before
    users = repr(query_marts(home, "select distinct user_id from fct_attribution_credits")[1])
    assert "erased-" in users
    assert ANNA not in users
    # a file of the marts that somebody has kept is found
    (home.marts_path.parent / "kept.parquet").write_bytes(b"")
    queue_erasure(home, ["user-bert-0002"], datetime.now(UTC))
    copy = home.home_path / "marts-of-yesterday.txt"
    copy.write_text("top user: user-bert-0002\n")
    failed = adtally("erase", "--yes")
    assert failed.status == 1
    assert failed.err.startswith(f"adtally: error: an id is still in {copy}")
    assert failed.err.count("\n") == 1
    copy.unlink()
    assert adtally("erase", "--yes").status == 0
    assert adtally("erase", "--yes").out == "nobody is to be erased: name somebody by --user or --file\n"
    assert _marts(home) == before


def test_what_a_person_types(home: Settings, adtally: Adtally, tmp_path: Path) -> None:
    shown = adtally("erase", "--user", ANNA, "--dry-run")
    assert shown.status == 0
    assert "events/eu/1.jsonl" in shown.out
    assert json.loads(adtally("erase", "--user", ANNA, "--dry-run", "--json").out)["rows"]["events"] == 3
    refused = adtally("erase", "--user", ANNA)
    assert (refused.status, "--yes does it" in refused.err) == (2, True)
    assert (adtally("erase", "--file", str(tmp_path / "none")).status, adtally("erase", "--queue").status) == (2, 2)
    assert (adtally("erase", "--user", "unknown", "--yes").status, adtally("erase", "--user", "", "--yes").status) == (2, 2)
    assert ANNA in _users(home)
    ids = tmp_path / "ids.txt"
    ids.write_text(f"{ANNA}\nuser-bert-0002\n")
    assert "2 requests added; 2 in the queue" in adtally("erase", "--file", str(ids), "--queue").out
    assert ANNA in _users(home)


def test_the_asset_carries_out_the_queue(home: Settings) -> None:
    assert isinstance(erasure_schedule(dg.build_schedule_context()), dg.SkipReason)
    asked = datetime.now(UTC) - timedelta(days=home.erasure_days) + DUE_SOON + timedelta(hours=1)
    queue_erasure(home, [ANNA], asked)
    assert read_signal(home, "erasure_due").ok
    due = read_signal(home, "erasure_due", now=datetime.now(UTC) + timedelta(hours=2))
    assert (due.ok, due.value, due.runbook) == (False, 1.0, "docs/runbooks/erasure-due.md")
    assert isinstance(erasure_schedule(dg.build_schedule_context()), dg.RunRequest)
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([erased_people], instance=instance)
        assert result.success
        (made,) = result.asset_materializations_for_node("erased_people")
        assert made.metadata["people"].value == 1
        assert ANNA not in "".join(str(event) for event in result.all_events)
    acts = [(entry.command, entry.run_id) for entry in read_audit_log(home) if entry.act == "erase"]
    assert acts == [("dagster erased_people", result.run_id)]
    assert ANNA not in _users(home)
    assert read_signal(home, "erasure_due", now=datetime.now(UTC) + timedelta(hours=2)).ok
