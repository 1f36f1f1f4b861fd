"""The trailing week: what is usual, what is not, and what too little is known of."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from expectations.trailing import (
    MAX_ROBUST_Z,
    MAX_STABILITY_INDEX,
    MOST_VALUES,
    REST,
    Shares,
    TrailingWeek,
    keep_largest,
    robust_z,
    stability_index,
)
from tests.expectations.small_lake import HOUR, Lake, validated

USUAL = {"region": {"eu": 6_000.0, "us": 4_000.0}}


def week(folder: Path, volumes: list[float], shares: dict[str, Shares] = USUAL) -> TrailingWeek:
    """A week that knows the same hour of as many days as there are volumes."""
    made = TrailingWeek(folder, "events")
    for day, volume in enumerate(volumes, start=1):
        made.keep(HOUR - timedelta(days=day), volume, shares)
    return made


@pytest.mark.parametrize(
    ("before", "now", "low", "high"),
    [
        pytest.param({"eu": 6, "us": 4}, {"eu": 600, "us": 400}, 0, 1e-9, id="the same"),
        pytest.param({"eu": 60, "us": 40}, {"eu": 62, "us": 38}, 0, 0.01, id="as good as the same"),
        pytest.param({"eu": 6, "us": 4}, {"eu": 2, "us": 8}, MAX_STABILITY_INDEX, 2, id="turned around"),
        pytest.param({"eu": 6, "us": 4}, {"eu": 10}, MAX_STABILITY_INDEX, 5, id="a region fell silent"),
        pytest.param({"eu": 6}, {"eu": 6, "us": 4}, MAX_STABILITY_INDEX, 5, id="a new region"),
        pytest.param({"eu": 6, REST: 4}, {"eu": 6, REST: 4}, 0, 1e-9, id="with a rest"),
    ],
)
def test_stability_index(before: dict[str, float], now: dict[str, float], low: float, high: float) -> None:
    assert low <= stability_index(before, now) <= high


@pytest.mark.parametrize(
    ("volumes", "volume", "is_usual"),
    [
        pytest.param([1000, 1000, 1000], 1000, True, id="the same"),
        pytest.param([1000, 1000, 1000], 1300, True, id="a tenth of the median is a deviation even if nothing ever moved"),
        pytest.param([1000, 1000, 1000], 0, False, id="nothing where there always was something"),
        pytest.param([1000, 990, 1010, 1005, 50_000], 1000, True, id="one wild day in the past"),
        pytest.param([1000, 990, 1010, 1005, 50_000], 50_000, False, id="a wild day now"),
        pytest.param([3, 5, 4], 9, True, id="a few may be a few more"),
        pytest.param([0, 0, 0], 0, True, id="never anything"),
        pytest.param([0, 0, 0], 500, False, id="something where there never was"),
    ],
)
def test_robust_z(volumes: list[float], volume: float, is_usual: bool) -> None:
    assert (robust_z(volumes, volume) <= MAX_ROBUST_Z) == is_usual


def test_too_few_known_hours_are_no_week(tmp_path: Path) -> None:
    made = week(tmp_path, [1000.0] * 2)
    assert (made.volumes(HOUR), made.shares(HOUR, "region")) == (None, None)
    made = week(tmp_path, [1000.0] * 3)
    assert made.volumes(HOUR) == [1000.0] * 3
    assert made.shares(HOUR, "region") == {"eu": 18_000, "us": 12_000}


def test_the_largest_values_are_kept_and_the_rest_is_one() -> None:
    many = {f"c-{n}": float(n) for n in range(MOST_VALUES + 5)}
    kept = keep_largest(many)
    assert list(kept)[:2] == ["c-204", "c-203"]
    assert (len(kept), kept[REST]) == (MOST_VALUES + 1, sum(range(5)))
    assert keep_largest({"eu": 2.0, "us": 0.0}) == {"eu": 2.0}


def test_a_week_that_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    made = week(tmp_path, [1000.0] * 4)
    for file, text in zip(sorted((tmp_path / "events").iterdir()), ["", "{", '{"volume": 1, "shares": [1]}'], strict=False):
        file.write_text(text)
    assert made.volumes(HOUR) is None


def test_hours_beyond_the_week_are_not_compared(tmp_path: Path) -> None:
    made = TrailingWeek(tmp_path, "events")
    for day in (8, 9, 10, 11):
        made.keep(HOUR - timedelta(days=day), 1000, USUAL)
    made.keep(HOUR + timedelta(days=1), 1000, USUAL)
    assert made.volumes(HOUR) is None
    assert made.shares(HOUR, "region") is None


def grown(made: Lake, hour: datetime, *, regions: str) -> None:
    """2,000 events of this hour, by regions."""
    made.sql(
        [
            f"insert into events select sample.* replace (event_id || '-' || n as event_id, {regions} as region, "
            f"timestamptz '{hour:%Y-%m-%d %H}:00:00+00' as event_time, date '{hour:%Y-%m-%d}' as event_date) "
            "from (select * from events where event_id = 'e-4') as sample, range(2000) as numbers(n)"
        ]
    )


def test_drift_and_volume_are_warnings_against_the_hours_validated_before(tmp_path: Path) -> None:
    made, docs = Lake(tmp_path / "lake"), tmp_path / "quality"
    made.sql(["delete from events where event_id <> 'e-4'"])
    days = [HOUR - timedelta(days=day) for day in range(5, 0, -1)]
    for day in days:
        grown(made, day, regions="if(n % 2 = 0, 'eu', 'us')")
    grown(made, HOUR, regions="'eu'")
    twice = (
        "insert into events select * replace (event_id || '-again' as event_id) from events where event_date = date '2025-06-02'"
    )
    made.sql([twice, twice.replace("again", "and-again")])
    made.write()
    before = [validated("events", made.uri("events"), None, day, docs=docs) for day in days]
    assert all(found.success for found in before)
    judged = [next(result for result in found.results if result.name == "table.volume").observed is not None for found in before]
    assert judged == [False, False, False, True, True]
    found = validated("events", made.uri("events"), None, HOUR, docs=docs)
    assert {result.name for result in found.failed} == {"region.drift", "table.volume"}
    assert not found.error_failed
    drift = next(result for result in found.results if result.name == "event_type.drift")
    assert (drift.success, drift.observed is not None) == (True, True)
    again = validated("events", made.uri("events"), None, HOUR, docs=docs)  # an hour is not compared with itself
    assert [(result.name, result.observed) for result in again.failed] == [
        (result.name, result.observed) for result in found.failed
    ]


def test_shares_of_few_rows_are_not_judged(tmp_path: Path) -> None:
    made, docs = Lake(tmp_path / "lake"), tmp_path / "quality"
    made.write()
    TrailingWeek(docs / "profiles", "events").keep(HOUR, 12, USUAL)
    for day in range(1, 5):
        TrailingWeek(docs / "profiles", "events").keep(HOUR - timedelta(days=day), 12, USUAL)
    found = {each.name: each for each in validated("events", made.uri("events"), None, HOUR, docs=docs).results}
    assert found["region.drift"].observed is None and found["region.drift"].success
    assert "not judged" in found["region.drift"].expected
    assert found["table.volume"].observed == 0
