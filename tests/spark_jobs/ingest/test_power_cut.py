"""The power cut at every durable step, and after an ingest said that it was done: nothing is lost, nothing counts twice.

The home lies on a disk whose power can be cut (`power.LoopDisk`). A run that was cut leaves the disk to the next run, which has to
bring the batch to its end, as in `test_crash`. Here what was not synced is gone as well; every third run is only killed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import lake
import pytest
from crash_points import CRASH_POINTS
from pyspark.sql import SparkSession

from services.simulator import simulate
from services.simulator.chaos import power
from spark_jobs.attribution.job import attribute
from spark_jobs.billing.job import bill
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.lake.tables import TABLES
from spark_jobs.steps import Step
from tests.spark_jobs.homes.held import Held
from tests.spark_jobs.ingest.test_crash import kill_at_each

pytestmark = pytest.mark.homes

# "amid": the commit is made and not synced yet. The key index is no commit, campaigns are written before the first batch.
POINTS: list[tuple[str, Step]] = [
    *CRASH_POINTS,
    *(("amid", step) for moment, step in CRASH_POINTS if moment == "before" and step not in (Step.KEY_INDEX, Step.COMMITS)),
]


# What follows the kill: the power goes at once, or seconds later (see LoopDisk.cut), or stays (None).
ENDS = (False, True, None)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[power.LoopDisk]:
    reason = power.why_not(tmp_path / "try")
    if reason is not None:
        pytest.skip(f"the power cut needs {power.LAYER}: {reason}")
    with power.LoopDisk(tmp_path) as made:
        yield made


def _all(spark: SparkSession, settings: Settings) -> dict[str, object]:
    """What every table holds: the comparable part of the ingest's, the number of rows of the others."""
    found: dict[str, object] = lake.everything(spark, settings)
    with Held(settings) as held:
        for name in TABLES:
            found.setdefault(name, held.rows(name, "count(*)"))
    return found


@pytest.mark.parametrize("seconds_later", [False, True], ids=["at once", "seconds later"])
def test_what_was_said_to_be_done_survives(seconds_later: bool, disk: power.LoopDisk, tmp_path: Path, spark: SparkSession) -> None:
    """Measured once without a sync: 61 empty files, among them commits of four tables, and 926 events missing."""
    settings = load_settings(home=disk.path / "home", max_files_per_batch=3)
    simulate(settings.landing_path, 1500, seed=5, lines_per_file=200)
    disk.sync()
    run_ingest(settings, spark=spark)
    attribute(settings)
    bill(settings)
    reconcile(settings, None)
    before = _all(spark, settings)
    disk.cut(seconds_later=seconds_later)
    folders = [path for name in TABLES for path in Path(settings.table_uri(name)).rglob("*") if path.is_file()]
    assert [path for path in folders if not path.stat().st_size] == []
    assert _all(spark, settings) == before
    report = run_ingest(settings, spark=spark)
    assert (report.offered, report.accepted) == (0, 0)
    assert _all(spark, settings) == before
    assert not reconcile(settings, None).differences


@pytest.mark.crash
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("quarter", range(4))
def test_the_power_is_cut_at_every_durable_step(quarter: int, disk: power.LoopDisk, tmp_path: Path, spark: SparkSession) -> None:
    ends = iter(list(zip(POINTS, itertools.cycle(ENDS), strict=False))[quarter::4])

    def end() -> None:
        _, seconds_later = next(ends)
        if seconds_later is not None:
            disk.cut(seconds_later=seconds_later)

    kill_at_each(
        load_settings(home=tmp_path / "calm"),
        load_settings(home=disk.path / "home"),
        spark,
        POINTS[quarter::4],
        files_each=2,  # a batch that is planned again may take the next file, too
        before_run=disk.sync,  # what was landed has lain there for long
        after_kill=end,
    )
