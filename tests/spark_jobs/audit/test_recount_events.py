"""The recount agrees with what was ingested, whatever was ingested and however the hours are asked; and what it leaves out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import correct
import lake
import pytest
from pyspark.sql import SparkSession

from services.simulator.chaos.traffic import CAMPAIGNS, Shape, Traffic
from spark_jobs.audit.checkpoints import FileQuery
from spark_jobs.audit.landing import LandedFile, missed_files
from spark_jobs.audit.plans import read_plans
from spark_jobs.audit.store import RawFile
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.units import HOUR, HourRange

pytestmark = pytest.mark.homes

SHAPES = [
    Shape(seed=1, records=120, event_files=5, order_files=1, runs=2, files_per_batch=2, split_bytes=4096),
    Shape(seed=2, records=120, event_files=4, order_files=1, runs=1, files_per_batch=100, split_bytes=16 * 1024 * 1024),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"seed {shape.seed}")
def test_the_recount_agrees_with_the_ingest_of_any_traffic(
    spark: SparkSession, tmp_path: Path, empty_lakehouse: Path, shape: Shape
) -> None:
    home = load_settings(home=tmp_path / "home", max_files_per_batch=shape.files_per_batch, split_bytes=shape.split_bytes)
    shutil.copytree(empty_lakehouse, home.lakehouse_uri)
    campaigns = home.landing_path / "campaigns" / "campaigns.csv"
    campaigns.parent.mkdir(parents=True)
    campaigns.write_text(CAMPAIGNS)
    for files in Traffic(shape).runs():
        for file in files:
            target = home.landing_path / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.stored)
            os.utime(target, ns=(file.modified_ms * 10**6, file.modified_ms * 10**6))
        run_ingest(home, spark=spark)
    whole = reconcile(home, None)
    assert whole.differences == []
    assert sum(hour.events_expected for hour in whole.hours) > 20
    for result in [hour for hour in whole.hours if hour.events_expected][:3]:  # the first of an id may lie in an hour not asked
        alone = reconcile(home, HourRange(result.hour, result.hour + HOUR))
        assert (alone.differences, alone.hours[0].events_expected) == ([], result.events_expected)


def test_a_replay_counts_as_offered_again_and_what_waits_does_not(spark: SparkSession, settings: Settings) -> None:
    lake.campaigns(settings)
    lake.land(settings, "events/eu/1.jsonl", [lake.event("e1"), lake.event("e2"), lake.event("e1", ad_id="a-2")])
    run_ingest(settings, spark=spark)
    lake.land(settings, "events/eu/2.jsonl", [lake.event("e3")])
    assert reconcile(settings, None).differences == []  # 2.jsonl waits
    shutil.rmtree(settings.checkpoints_path / "events")
    run_ingest(settings, spark=spark)
    report = reconcile(settings, None)
    assert report.differences == []
    assert [(hour.events_expected, hour.events_found) for hour in report.hours] == [(3, 3)]


def test_a_batch_is_planned_anew_where_its_plan_is_gone(spark: SparkSession, settings: Settings) -> None:
    lake.campaigns(settings)
    for number in range(3):
        lake.land(settings, f"events/eu/{number}.jsonl", [lake.event(f"e{number}"), lake.event("e0"), lake.event("e", ad_id="")])
    run_ingest(settings, spark=spark)
    reconcile(settings, None)
    log = Path(settings.table_uri("events")) / "_delta_log"
    read = read_plans(settings, 3)
    assert [[file.name for file in plan.files] for plan in read] == [[f"events/eu/{n}.jsonl"] for n in range(3)]
    # the log of events is cleaned up to a checkpoint, as Delta does after a while; the catalogue still knows the plans
    from deltalake import DeltaTable

    DeltaTable(settings.table_uri("events")).create_checkpoint()
    for number in range(3):
        (log / f"{number:020d}.json").unlink()
    assert read_plans(settings, 3) == read
    assert reconcile(settings, None).differences == []
    shutil.rmtree(settings.recount_path)  # and now nobody does
    assert reconcile(settings, None).differences == []
    correct.delete(settings, "events", "event_id = 'e1'")
    assert {found.cause for found in reconcile(settings, None, repair=True).differences} == {"event_lost"}
    assert reconcile(settings, None).differences == []


def _landed(name: str, *, mtime: int, renamed: int) -> LandedFile:
    return LandedFile(name, RawFile(f"/landing/{name}", mtime, 1), renamed * 10**9)


@pytest.mark.parametrize(
    ("file", "taken", "missed"),
    [
        (_landed("events/eu/f", mtime=5, renamed=100), {"events/eu/f"}, True),  # in a batch that ended, and in no plan
        (
            _landed("events/eu/f", mtime=5, renamed=100),
            {"events/eu/late"},
            True,
        ),  # a file behind it, that came clearly later, was taken
        (_landed("events/eu/f", mtime=5, renamed=100), {"events/eu/early"}, False),  # it may have come after the listing
        (_landed("events/eu/f", mtime=9, renamed=100), {"events/eu/late"}, False),  # it stands behind what was taken
        (_landed("events/eu/f", mtime=5, renamed=195), {"events/eu/late"}, False),  # about the same moment
        (_landed("events/eu/f", mtime=5, renamed=100), set(), False),
    ],
)
def test_a_missed_file_is_told_from_one_that_waits(file: LandedFile, taken: set[str], missed: bool) -> None:
    others = {
        "events/eu/late": _landed("events/eu/late", mtime=7, renamed=200),
        "events/eu/early": _landed("events/eu/early", mtime=7, renamed=50),
    }
    query = FileQuery("q", frozenset({0}), frozenset(taken))
    found = missed_files({**others, file.name: file}, set(others), query)
    assert [entry.name for entry in found] == ([file.name] if missed else [])
