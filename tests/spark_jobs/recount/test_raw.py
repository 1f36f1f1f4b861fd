"""The recount of what was read from Kafka, by the table of raw records: as of files, whatever that table has and lacks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import correct
import lake
import pytest
from pyspark.sql import SparkSession
from topics import Topic, point_at

from services.launcher.kafka import Kafka
from spark_jobs.config import Settings, load_settings
from spark_jobs.jobs.ingest import run_ingest
from spark_jobs.jobs.reconcile import ReconcileReport, reconcile
from spark_jobs.jobs.status import read_status
from tests.spark_jobs.jobs.faults import FAULTS, Fault

ELSE = {"event_time": "2025-06-02T07:30:00Z", "received_at": "2025-06-02T07:30:01Z"}
EU = [
    *(b"nonsense", lake.event("t1"), lake.event("t1"), lake.event("t2", campaign_id="nobody"), None, b""),
    *(lake.event(f"e{n}", ad_id=f"a-{n % 3}", event_type="click" if n % 4 else "impression") for n in range(40)),
    b"{\n" + lake.lines([lake.event("spread")])[1:],
]
US = [
    *(lake.event("t1", **ELSE), lake.event("t1", user_id="u-9"), lake.event("t3", received_at=None), b"\xff", b"x" * 70_000),
    *(lake.event(f"e{n}", ad_id=f"a-{n % 3}", event_type="click" if n % 4 else "impression") for n in range(30, 60)),
    *(lake.event(f"m{n}", region="eu-west", **ELSE) for n in range(10)),
]


@pytest.fixture(scope="module")
def base(spark: SparkSession, kafka: Kafka, tmp_path_factory: pytest.TempPathFactory, empty_lakehouse: Path) -> Settings:
    """A home that has read two clusters and a file, in several batches; nobody changes it."""
    made = load_settings(home=tmp_path_factory.mktemp("raw") / "home")
    shutil.copytree(empty_lakehouse, made.lakehouse_uri)
    lake.campaigns(made)
    eu, us, orders = (Topic(kafka.bootstrap_servers, name) for name in ("eu", "us", "orders"))
    point_at(made, ("eu-west", eu, orders), ("us-east", us, orders), more="max_offsets_per_batch = 20\n")
    lake.land(made, "events/eu-west/of-file.jsonl", [lake.event("of-file"), lake.event("e3", ad_id="a-0", event_type="click")])
    run_ingest(made, spark=spark)
    eu.send(EU[:20], 0)
    eu.send([lake.event("never")] * 3, 0, abort=True)  # offsets without a record, as the marker behind them
    eu.send(EU[20:], 1, transaction=True)
    us.send(US, 0)
    run_ingest(made, spark=spark)
    return made


@pytest.fixture
def home(base: Settings, tmp_path: Path) -> Settings:
    """A copy of the base home to tamper with."""
    return correct.copied(base, tmp_path / "home")


@pytest.fixture(scope="module")
def truth(base: Settings) -> dict[str, Any]:
    """What the base home holds."""
    return correct.contents(base)


def causes(report: ReconcileReport) -> tuple[str, ...]:
    return tuple(sorted({found.cause for found in report.differences}))


def test_clean_data_has_no_difference(base: Settings) -> None:
    report = reconcile(base, None)
    assert report.differences == []
    held = correct.rows(base, "select count(*), sum(spend_nanos)::bigint from events")
    assert [(sum(h.events_expected for h in report.hours), sum(h.nanos_expected for h in report.hours))] == held
    assert correct.rows(base, "select distinct source, region from batch_ledger where stream = 'events' and offered > 0") == [
        *(("files", "eu-west"), ("kafka", "eu-west"), ("kafka", "us-east")),
    ]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found_and_put_right_once(home: Settings, truth: dict[str, Any], fault: Fault) -> None:
    fault.plant(home)
    repaired = reconcile(home, None, repair=True)
    assert set(causes(repaired)) >= set(fault.causes)
    assert repaired.remaining == []
    assert correct.contents(home) == truth
    assert read_status(home).conservation_holds
    assert reconcile(home, None).differences == []
