"""Which prices are in force, and when the campaign files are read again."""

from __future__ import annotations

from pathlib import Path

import pytest

from spark_jobs.config import load_settings
from spark_jobs.ingest import campaigns
from spark_jobs.ingest.in_force import InForce
from spark_jobs.lake.writes import ensure_tables

HEADER = "campaign_id,store_id,billing_model,daily_budget_micros,currency,valid_from,valid_to\n"
GOOD = f"{HEADER}c-1,st-1,cpc,1000000,EUR,2025-01-01,\n"
OTHER = f"{HEADER}c-1,st-1,cpm,1000000,EUR,2025-01-01,\n"  # as many bytes


def test_campaign_files_are_parsed_only_if_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(home=tmp_path)
    ensure_tables(settings)
    file = settings.landing_path / "campaigns" / "all.csv"
    file.parent.mkdir(parents=True)
    file.write_text(GOOD)
    reads: list[int] = []
    read_campaigns = campaigns.read_campaigns

    def counted(landing: Path) -> list[campaigns.Campaign]:
        reads.append(1)
        return read_campaigns(landing)

    monkeypatch.setattr(campaigns, "read_campaigns", counted)
    notices: list[str] = []
    in_force = InForce(settings, notices.append)

    first = in_force.prices()
    assert (in_force.prices(), len(reads)) == (first, 1)
    file.write_text(OTHER)
    second = in_force.prices()
    assert (second, len(reads)) == (first + 1, 2)
    file.write_text("no campaigns")
    assert (in_force.prices(), in_force.prices(), len(reads)) == (second, second, 4)
    file.write_text(OTHER)
    assert (in_force.prices(), in_force.prices(), len(reads)) == (second, second, 5)
    assert [notice.endswith("the prices in force stay") for notice in notices] == [True, False]
    (file.parent / "more.csv").write_text(GOOD.replace("c-1", "c-2"))
    assert (in_force.prices(), len(reads)) == (second + 1, 6)


def test_prices_that_another_process_changed_are_loaded_again(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    ensure_tables(settings)
    (settings.landing_path / "campaigns").mkdir(parents=True)
    file = settings.landing_path / "campaigns" / "all.csv"
    file.write_text(GOOD)
    in_force = InForce(settings)
    in_force.prices()
    file.write_text(OTHER)
    InForce(settings).prices()
    file.write_text(GOOD)
    version = in_force.prices()
    assert campaigns.campaigns_at(settings, version)["billing_model"].to_pylist() == ["cpc"]
