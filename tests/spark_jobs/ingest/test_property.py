"""Any records, in any files, batches and order of arrival, come to what an oracle in plain Python says: rows and totals.

So do the marks of invalid traffic, at ingest and after a review, whether or not there were reviews between the runs.

An example costs seconds, so each holds many records, and its traffic comes from a seed that is biased towards what can go wrong.
``PROPERTY_EXAMPLES=100 pytest tests/spark_jobs/ingest/test_property.py`` looks further than `make test`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from services.simulator.chaos import oracle
from services.simulator.chaos.checks import check_accepted, check_increments, check_ledger, check_minutes, check_refused
from services.simulator.chaos.oracle import Books, Landed
from services.simulator.chaos.traffic import CAMPAIGNS, Shape, Traffic
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.ingest.files.landing import Reason, walk_landing
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.traffic.review import review
from tests.spark_jobs.homes.held import Held

pytestmark = pytest.mark.homes

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "6"))

# the first of each is what the first example has, so it is none of the trivial ones
shapes = st.builds(
    Shape,
    seed=st.integers(0, 2**32 - 1),
    records=st.integers(60, 120),
    event_files=st.sampled_from((4, 3, 5, 6, 2, 1)),
    order_files=st.sampled_from((2, 1, 3)),
    runs=st.sampled_from((2, 1)),
    files_per_batch=st.sampled_from((2, 3, 1, 100)),
    split_bytes=st.sampled_from((4096, 16 * 1024 * 1024)),
    reviews=st.booleans(),
)


def check_books(held: Held, books: Books) -> None:
    check_accepted(held, books)
    check_ledger(held, books)
    check_minutes(held, books)


def _land(home: Settings, file: Landed) -> None:
    target = home.landing_path / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = target.with_name(f".{target.name}.tmp")
    hidden.write_bytes(file.stored)
    os.utime(hidden, ns=(file.modified_ms * 10**6, file.modified_ms * 10**6))
    hidden.rename(target)


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory, empty_lakehouse: Path) -> Callable[..., Settings]:
    """Makes a home with empty tables, as the fixture ``settings`` does, for an example of its own."""
    folder = tmp_path_factory.mktemp("property")
    numbers = count()

    def make(**changes: object) -> Settings:
        made = load_settings(home=folder / str(next(numbers)), **changes)
        shutil.copytree(empty_lakehouse, made.lakehouse_uri)
        return made

    return make


@pytest.mark.timeout(max(600, 60 * EXAMPLES))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=False,
    print_blob=True,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # to shrink would take a minute a step; a shape says all
    suppress_health_check=[HealthCheck.too_slow],
)
@given(shape=shapes)
def test_the_pipeline_agrees_with_the_oracle(spark: SparkSession, homes: Callable[..., Settings], shape: Shape) -> None:
    home = homes(max_files_per_batch=shape.files_per_batch, split_bytes=shape.split_bytes)
    runs = Traffic(shape).runs()
    campaigns = home.landing_path / "campaigns" / "campaigns.csv"
    campaigns.parent.mkdir(parents=True)
    campaigns.write_text(CAMPAIGNS)
    reports = []
    for files in runs:
        for file in files:
            _land(home, file)
        reports.append(run_ingest(home, spark=spark))
        if shape.reviews and files is not runs[-1]:
            review(home)
    books = oracle.account(runs, CAMPAIGNS, now=datetime.now(UTC))
    assert {entry.name for entry in walk_landing(home.landing_path) if entry.reason is Reason.REGION_NAME} == books.unread
    with Held(home) as held:
        check_refused(held, books)
        if not (shape.reviews and len(runs) > 1):
            check_books(held, books)
            check_increments(held)
    assert not reconcile(home, None).differences
    review(home)
    oracle.review(books)
    with Held(home) as held:
        check_books(held, books)
    assert not review(home).hours
    assert not reconcile(home, None).differences
    for name in ("offered", "accepted", "duplicate", "conflict", "rejected", "late"):
        assert sum(getattr(report, name) for report in reports) == sum(cell[name] for cell in books.ledger.values()), name
    shutil.rmtree(home.home_path)
