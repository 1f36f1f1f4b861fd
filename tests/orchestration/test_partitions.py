"""Where the hourly partitions begin, and ranges of them."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from orchestration.partitions import (
    RANGE_END_TAG,
    RANGE_START_TAG,
    contiguous,
    first_hour,
    hour_of,
    hourly_partitions,
    hours_of,
    range_tags,
)
from spark_jobs.config import load_settings
from spark_jobs.errors import UsageError
from spark_jobs.lake.tables import BATCH_LEDGER
from spark_jobs.units import HOUR, HourRange
from tests.orchestration.marts.delta_files import commit, utc
from tests.orchestration.marts.lakes import ledger_row

NOW = utc("2026-03-12T08:30")


def test_without_anything_they_begin_today(tmp_path: Path) -> None:
    assert hourly_partitions(load_settings(home=tmp_path), now=NOW).start == utc("2026-03-12T00:00")


def test_they_begin_on_the_day_of_the_first_accepted_record(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    rows = [ledger_row(0, "2001-01-01T00:00", rejected=1), ledger_row(0, None, rejected=1)]
    commit(Path(settings.lakehouse_uri), BATCH_LEDGER, rows)
    assert hourly_partitions(settings, now=NOW).start == utc("2026-03-12T00:00")
    commit(Path(settings.lakehouse_uri), BATCH_LEDGER, [ledger_row(1, "2026-03-10T10:00", accepted=1)])
    assert hourly_partitions(settings, now=NOW).start == utc("2026-03-10T00:00")


def test_an_outlier_decides_nothing(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    lake = Path(settings.lakehouse_uri)
    commit(lake, BATCH_LEDGER, [ledger_row(0, "2000-01-01T00:00", accepted=1), ledger_row(0, "9999-12-31T23:00", accepted=1)])
    commit(lake, BATCH_LEDGER, [ledger_row(1, "2026-03-11T10:00", accepted=1)])
    assert hourly_partitions(settings, now=NOW).start == utc("2026-03-11T00:00")
    rows = [ledger_row(2, "2026-02-01T05:00", accepted=1), ledger_row(2, "2025-01-01T05:00", accepted=1)]
    commit(lake, BATCH_LEDGER, rows)  # 40 days before are few enough hours, a year before is too many for one
    assert hourly_partitions(settings, now=NOW).start == utc("2026-02-01T00:00")
    commit(lake, BATCH_LEDGER, [ledger_row(3, f"2025-01-01T{hour:02}:00", accepted=1) for hour in range(12)])
    assert hourly_partitions(settings, now=NOW).start == utc("2025-01-01T00:00")


def test_where_partitions_begin() -> None:
    newest = utc("2026-03-10T00:00")

    def before(*hours: int) -> int:
        found = first_hour([newest - hour * HOUR for hour in sorted(hours, reverse=True)])
        assert found is not None
        return (newest - found) // HOUR

    assert first_hour([]) is None
    assert before(0) == 0
    assert before(0, 1000) == 1000
    assert before(0, 1001) == 0
    assert before(0, 1500, 1600) == 1600  # two for 1600
    assert before(0, 900, 1900) == 1900  # one for each thousand
    assert before(0, 900, 1901) == 900
    assert before(*range(0, 5000, 7), 230_000) == 4998


def test_the_start_date_is_obeyed(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, start_date="2026-03-01T02:00:00+02:00")
    commit(Path(settings.lakehouse_uri), BATCH_LEDGER, [ledger_row(1, "2026-02-10T10:00", accepted=1)])
    assert hourly_partitions(settings, now=NOW).start == utc("2026-03-01T00:00")


def test_years_of_hours_load_quickly(tmp_path: Path) -> None:
    began = time.monotonic()
    settings = load_settings(home=tmp_path, start_date="2019-11-24T00:00:00Z")
    keys = hourly_partitions(settings).get_partition_keys()
    assert keys[0] == "2019-11-24-00:00"
    assert keys[-1] == f"{datetime.now(UTC):%Y-%m-%d-%H:00}"  # the running hour is one: the stream writes into it
    assert len(keys) > 60_000
    assert time.monotonic() - began < 10


def test_an_hour_and_its_key() -> None:
    assert hour_of("2026-03-10-07:00") == utc("2026-03-10T07:00")
    for wrong in ("2026-03-10", "2026-03-10T07:00", "yesterday"):
        with pytest.raises(UsageError, match="is not a partition"):
            hour_of(wrong)


def test_a_range_of_keys_and_the_tags_of_its_run() -> None:
    hours = hours_of(dg.PartitionKeyRange("2026-03-10-22:00", "2026-03-11-01:00"))
    assert hours == HourRange(utc("2026-03-10T22:00"), utc("2026-03-11T02:00"))
    assert range_tags(hours) == {RANGE_START_TAG: "2026-03-10-22:00", RANGE_END_TAG: "2026-03-11-01:00"}
    with pytest.raises(UsageError, match="not a whole hour"):
        hours_of(dg.PartitionKeyRange("2026-03-10-22:30", "2026-03-11-01:00"))


def test_contiguous_hours_are_one_range() -> None:
    begin = utc("2026-03-10T00:00")
    hours = [begin + timedelta(hours=number) for number in (0, 1, 2, 3, 7, 9, 10)]
    found = [(str(found), len(found)) for found in contiguous(hours, longest=3)]
    assert found == [
        ("2026-03-10T00Z to 2026-03-10T03Z", 3),
        ("2026-03-10T03Z to 2026-03-10T04Z", 1),
        ("2026-03-10T07Z to 2026-03-10T08Z", 1),
        ("2026-03-10T09Z to 2026-03-10T11Z", 2),
    ]
    assert list(contiguous([], longest=3)) == []
    assert [hour for found in contiguous(hours, longest=3) for hour in found] == hours
    assert [found.end - found.start for found in contiguous(hours[:1], longest=3)] == [HOUR]
