"""Cases of odd records: each landing folder of tests/cases/records is ingested, reviewed, compacted and recounted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import correct
import pytest
from local import LocalEvents

from spark_jobs.config import Settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.ingest.campaigns import load_campaigns
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.compact import compact
from spark_jobs.operate.status import read_status
from spark_jobs.traffic.review import review

CASES = Path(__file__).resolve().parents[2] / "cases" / "records"


@pytest.mark.parametrize("case", sorted(path.parent.name for path in CASES.glob("*/expected.json")))
def test_odd_records_are_counted_right(settings: Settings, case: str) -> None:
    shutil.copytree(CASES / case / "landing", settings.landing_path)
    ensure_tables(settings)
    load_campaigns(settings)
    job = LocalEvents(settings)
    report = job.take_landed(sorted(settings.landing_path.glob("events/*/*")))
    review(settings)
    compact(settings, None)
    (row,) = correct.rows(
        settings,
        "select sum(spend_nanos)::varchar, sum(invalid_impressions)::bigint, sum(impressions + clicks)::bigint from minute_metrics",
    )
    found: dict[str, Any] = {
        **{name: getattr(report, name) for name in ("offered", "accepted", "duplicate", "conflict", "rejected")},
        "spend_nanos": row[0],
        "invalid_impressions": row[1],
    }
    assert found == json.loads((CASES / case / "expected.json").read_text("utf-8"))
    assert row[1] + row[2] == report.accepted
    assert reconcile(settings, None).differences == []
    status = read_status(settings)
    assert status.conservation_holds, status.problems
