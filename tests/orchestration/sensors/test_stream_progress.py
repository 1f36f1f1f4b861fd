"""What the sensor tells of the stream's commits: everything once, in bounded chunks, and empty hours when they close."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from orchestration.partitions import KEY_FORMAT
from orchestration.sensors import stream_progress
from orchestration.sensors.stream_progress import stream_progress_sensor
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.tables import BATCH_LEDGER, CAMPAIGNS, HOUR_CLOSINGS, MINUTE_METRICS, NAMES, Table
from spark_jobs.units import HOUR
from tests.orchestration.marts.delta_files import commit, utc
from tests.orchestration.marts.lakes import increment, ledger_row

EVENT_TABLES = {"ad_events", "rejected_events", "minute_metrics", "batch_ledger"}


class Home:
    """A home whose ledger is written by hand, and the sensor's ticks on it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, start: str = "2026-03-10T00:00") -> None:
        monkeypatch.setenv("ADTALLY_HOME", str(path))
        self.settings: Settings = load_settings()
        self.lake = Path(self.settings.lakehouse_uri)
        self.cursor: str | None = None
        self.start_at(start)

    def start_at(self, start: str) -> None:
        self.sensor = stream_progress_sensor(partitions(start))

    def book(self, *rows: dict[str, Any]) -> int:
        return commit(self.lake, BATCH_LEDGER, rows)

    def tick(self) -> list[dg.AssetMaterialization | dg.AssetObservation]:
        result = self.sensor.evaluate_tick(dg.build_sensor_context(cursor=self.cursor))
        self.cursor = result.cursor
        assert not result.run_requests
        return [event for event in result.asset_events if not isinstance(event, dg.AssetCheckEvaluation)]

    def told(self, most: int = 50) -> list[dg.AssetMaterialization | dg.AssetObservation]:
        """All that is told until there is nothing new."""
        found: list[dg.AssetMaterialization | dg.AssetObservation] = []
        for _ in range(most):
            events = self.tick()
            if not events:
                return found
            found += events
        raise AssertionError(f"still something to tell after {most} ticks")


def partitions(start: str) -> dg.HourlyPartitionsDefinition:
    return dg.HourlyPartitionsDefinition(start_date=utc(start), timezone="UTC", fmt=KEY_FORMAT, end_offset=1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    return Home(tmp_path / "home", monkeypatch)


def of(events: list[Any], key: str, partition: str | None = None) -> list[dict[str, Any]]:
    """The metadata of one asset's events."""
    return [
        {name: value.value for name, value in event.metadata.items()}
        for event in events
        if event.asset_key == dg.AssetKey(key) and (partition is None or event.partition == partition)
    ]


def places(events: list[Any]) -> Counter[tuple[str, str | None]]:
    return Counter((event.asset_key.to_user_string(), event.partition) for event in events)


def test_nothing_ingested_is_nothing_told(home: Home) -> None:
    assert home.tick() == []


def test_each_commit_is_told_once_with_its_figures(home: Home) -> None:
    received, ingested = utc("2026-03-10T10:07"), utc("2026-03-10T10:08")
    times = {"max_received_at": received, "ingested_at": ingested}
    commit(home.lake, MINUTE_METRICS, [increment("u1", 0, "2026-03-10T10:05"), increment("u2", 0, "2026-03-10T10:06")])
    home.book(
        ledger_row(0, "2026-03-10T10:00", accepted=5, duplicate=2, rejected=1, conflict=1, late=2, spend_nanos=2500, **times),
        ledger_row(0, "2026-03-10T10:00", accepted=1, region="us", spend_nanos=1000, **times),
        ledger_row(0, "2026-03-10T09:00", accepted=3, stream="orders", source="orders", **times),
    )
    first = home.tick()
    assert places(first) == Counter(
        {
            **{(key, "2026-03-10-10:00"): 1 for key in EVENT_TABLES},
            **{(key, "2026-03-10-09:00"): 1 for key in ("orders", "rejected_orders", "batch_ledger")},
        }
    )
    [events] = of(first, "ad_events")
    assert events == {
        "rows_added": 6,
        "rows_in_hour": 6,
        "offered": 10,
        "duplicate": 2,
        "conflict": 1,
        "rejected": 1,
        "late": 2,
        "batches": 1,
        "lag_seconds": 60.0,
        "lag": "1 min 0 s",
    }
    assert [(found["rows_added"], found["rejected"], found["conflict"]) for found in of(first, "rejected_events")] == [(2, 1, 1)]
    [metrics] = of(first, "minute_metrics")
    assert (metrics["events_added"], metrics["rows_in_hour"], metrics["delta_version"]) == (6, 2, 0)
    assert [found["rows_in_hour"] for found in of(first, "orders")] == [3]
    assert of(first, "batch_ledger", "2026-03-10-10:00") == [
        {"rows_added": 2, "rows_in_hour": 2, "batches": 1, "corrections": 0, "delta_version": 0}
    ]
    assert home.tick() == []

    home.book(ledger_row(1, "2026-03-10T10:00", accepted=2, spend_nanos=499))
    home.book(ledger_row(2, "2026-03-10T10:00", accepted=1))
    [events] = of(home.tick(), "ad_events")
    assert (events["rows_added"], events["rows_in_hour"], events["batches"]) == (3, 9, 2)
    assert home.tick() == []


def test_a_correction_shows_in_the_rows_of_its_hour(home: Home) -> None:
    home.book(ledger_row(0, "2026-03-10T10:00", accepted=5, spend_nanos=5000))
    home.told()
    home.book(ledger_row(0, "2026-03-10T10:00", accepted=-1, spend_nanos=-1000, max_received_at=None, _run_id="r1"))
    told = home.tick()
    [events] = of(told, "ad_events")
    assert (events["rows_added"], events["rows_in_hour"]) == (-1, 4)
    assert "lag_seconds" not in events
    assert [found["corrections"] for found in of(told, "batch_ledger")] == [1]


@pytest.mark.parametrize("commits", [1, 7], ids=["in one commit", "in many"])
def test_many_hours_are_told_in_chunks_each_once(home: Home, monkeypatch: pytest.MonkeyPatch, commits: int) -> None:
    monkeypatch.setattr(stream_progress, "HOURS_A_TICK", 3)
    monkeypatch.setattr(stream_progress, "COMMITS_A_TICK", 2)
    hours = [f"2026-03-10T{hour:02}:00" for hour in range(14)]
    home.book(ledger_row(0, "2026-03-10T00:00", accepted=1))
    home.told()
    for batch in range(commits):
        home.book(*(ledger_row(batch + 1, hour, accepted=1) for hour in hours[batch::commits]))
    told: list[Any] = []
    while events := home.tick():
        assert len(events) <= 3 * len(EVENT_TABLES)
        told += events
    assert places(told) == Counter({(key, f"{hour[:10]}-{hour[11:]}"): 1 for hour in hours for key in EVENT_TABLES})


def test_what_has_no_partition_is_told_without_one(home: Home) -> None:
    """A record without a time, one from another age, and one of the far future: rejected, and none of them is an hour."""
    home.book(
        ledger_row(0, None, rejected=2),
        ledger_row(0, "1999-01-01T00:00", rejected=1),
        ledger_row(0, "2199-01-01T00:00", rejected=1),
    )
    told = home.tick()
    assert [type(event) for event in told] == [dg.AssetObservation]
    assert of(told, "rejected_events") == [{"rejected_without_partition": 4}]
    assert home.tick() == []


def test_hours_before_the_first_partition_are_told_once_there_are_partitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code location was loaded with an empty lakehouse, so that its partitions began on that day."""
    home = Home(tmp_path, monkeypatch, start="2026-03-12T00:00")
    home.book(ledger_row(0, "2026-03-10T10:00", accepted=5), ledger_row(0, "2026-03-12T10:00", accepted=1))
    assert {partition for _, partition in places(home.told())} == {"2026-03-12-10:00"}
    home.start_at("2026-03-10T00:00")  # loaded again
    assert [found["rows_in_hour"] for found in of(home.told(), "ad_events", "2026-03-10-10:00")] == [5]


def test_a_rebuilt_table_is_told_anew(home: Home) -> None:
    for batch in range(3):
        home.book(ledger_row(batch, "2026-03-10T10:00", accepted=1))
    home.told()
    shutil.rmtree(home.lake / "batch_ledger")
    home.book(ledger_row(0, "2026-03-10T11:00", accepted=7))
    assert [found["rows_added"] for found in of(home.told(), "ad_events", "2026-03-10-11:00")] == [7]
    # as many versions as were told before: only its id says that it is another
    shutil.rmtree(home.lake / "batch_ledger")
    home.book(ledger_row(0, "2026-03-10T12:00", accepted=9))
    assert [found["rows_added"] for found in of(home.told(), "ad_events", "2026-03-10-12:00")] == [9]


def test_a_compaction_is_no_news(home: Home) -> None:
    home.book(ledger_row(0, "2026-03-10T10:00", accepted=1))
    home.told()
    version = home.book(ledger_row(0, "2026-03-10T10:00", accepted=1))
    path = home.lake / "batch_ledger" / "_delta_log" / f"{version:020d}.json"
    actions = [json.loads(line) for line in path.read_text().splitlines()]
    for action in actions:
        if "add" in action:
            action["add"]["dataChange"] = False
    path.write_text("\n".join(json.dumps(action) for action in actions) + "\n")
    assert home.tick() == []


@pytest.mark.parametrize("gone", ["log", "files"])
def test_commits_that_are_gone_are_told_by_what_the_table_holds(home: Home, gone: str) -> None:
    """While nobody looked, the log was cleaned or the files were compacted and vacuumed."""
    home.book(ledger_row(0, "2026-03-10T10:00", accepted=1))
    home.told()
    folder = home.lake / "batch_ledger"
    version = home.book(ledger_row(1, "2026-03-10T10:00", accepted=2))
    path = folder / "_delta_log" / f"{version:020d}.json"
    [added] = [action["add"] for action in map(json.loads, path.read_text().splitlines()) if "add" in action]
    newest = home.book(ledger_row(2, "2026-03-10T11:00", accepted=4))
    if gone == "files":
        moved = {**added, "path": "compacted.parquet", "dataChange": False}
        (folder / added["path"]).rename(folder / "compacted.parquet")
        removed = {"path": added["path"], "dataChange": False, "deletionTimestamp": 0}
        last = folder / "_delta_log" / f"{newest + 1:020d}.json"
        last.write_text(f"{json.dumps({'remove': removed})}\n{json.dumps({'add': moved})}\n")
    else:
        from deltalake import DeltaTable

        DeltaTable(folder).create_checkpoint()
        path.unlink()
    told = home.told()
    assert [found["rows_in_hour"] for found in of(told, "ad_events", "2026-03-10-10:00")] == [3]
    assert [found["rows_in_hour"] for found in of(told, "ad_events", "2026-03-10-11:00")] == [4]
    assert home.tick() == []


@pytest.mark.parametrize("table", [CAMPAIGNS, NAMES], ids=lambda table: table.name)
def test_a_table_of_landing_files_is_told_when_its_version_changes(home: Home, table: Table) -> None:
    home.book(ledger_row(0, "2026-03-10T10:00", accepted=1))
    commit(home.lake, table, [])
    assert [found["delta_version"] for found in of(home.told(), table.name)] == [0]
    commit(home.lake, table, [])
    assert of(home.told(), table.name) == [{"delta_version": 1}]


# The source has come to 16:00, so hours through 15:00 are closed (grace: a quarter of an hour).
def closing_home(home: Home) -> None:
    times = {"max_received_at": utc("2026-03-10T16:00"), "ingested_at": utc("2026-03-10T16:00")}
    home.book(
        ledger_row(0, "2026-03-10T10:00", accepted=1, **times),
        ledger_row(0, "2026-03-10T13:00", accepted=1, **times),
        ledger_row(0, "2026-03-10T15:00", accepted=1, **times),
    )


def test_closed_hours_without_events_are_empty_not_missing(home: Home) -> None:
    closing_home(home)
    first = home.tick()
    assert {partition for _, partition in places(first)} == {f"2026-03-10-{hour}:00" for hour in (10, 13, 15)}
    empty = home.tick()
    assert {hour for key, hour in places(empty) if key == "ad_events"} == {f"2026-03-10-{hour}:00" for hour in (11, 12, 14)}
    assert all(found == {"rows_added": 0, "rows_in_hour": 0} for found in of(empty, "ad_events"))
    # no order came at all: their tables are empty in every closed hour, and say nothing of the one that is open
    assert {hour for key, hour in places(empty) if key == "orders"} == {f"2026-03-10-{hour}:00" for hour in range(10, 15)}
    assert max(places(first + empty).values()) == 1
    assert home.tick() == []


def test_empty_hours_are_told_once_and_late_events_after_them(home: Home) -> None:
    closing_home(home)
    home.told()
    home.book(ledger_row(1, "2026-03-10T11:00", accepted=1, late=1, max_received_at=utc("2026-03-10T18:20")))
    told = home.told()
    assert of(told, "ad_events", "2026-03-10-11:00")[0]["late"] == 1
    # its ingestion, not the collector's clock, says how far the source is: nothing more is closed
    assert {hour for key, hour in places(told) if key == "ad_events"} == {"2026-03-10-11:00"}


def test_an_operator_closes_empty_hours(home: Home) -> None:
    closing_home(home)
    home.told()
    through = {"closed_through": utc("2026-03-10T17:00"), "reason": "down", "closed_by": "me", "closed_at": utc("2026-03-10T17:30")}
    commit(home.lake, HOUR_CLOSINGS, [through])
    assert {hour for key, hour in places(home.told()) if key == "ad_events"} == {"2026-03-10-16:00"}


def test_a_long_time_without_records_is_not_told_hour_by_hour(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_progress, "HOURS_A_TICK", 5)
    at = datetime(2026, 9, 10, 12, tzinfo=UTC)
    home.book(
        ledger_row(0, "2026-03-10T10:00", accepted=1, max_received_at=at, ingested_at=at),
        ledger_row(0, "2026-09-10T02:00", accepted=1, max_received_at=at, ingested_at=at),
        ledger_row(0, f"{at - 2 * HOUR:%Y-%m-%dT%H:%M}", accepted=1, max_received_at=at, ingested_at=at),
    )
    told: list[Any] = []
    while events := home.tick():
        assert len(events) <= 5 * 6
        told += events
    empty = {str(partition) for key, partition in places(told) if key == "orders"}
    assert min(empty - {"2026-03-10-10:00"}) == "2026-09-10-02:00"
    assert len(empty) == 1 + 9  # 02:00 to 10:00, all of it closed at 11:45


def test_a_cursor_of_another_form_begins_anew(home: Home) -> None:
    home.book(ledger_row(0, "2026-03-10T10:00", accepted=1))
    for cursor in ("7", "{", '{"version": 3}', "[]"):
        home.cursor = cursor
        assert of(home.tick(), "ad_events")


def test_an_hour_that_begins_soon_is_told(home: Home) -> None:
    """A clock may run ahead by less than ADTALLY_FUTURE_SKEW: such events are accepted."""
    ahead = datetime.now(UTC) + timedelta(minutes=59)
    home.book(ledger_row(0, f"{ahead:%Y-%m-%dT%H:00}", accepted=1))
    assert {partition for _, partition in places(home.tick())} == {f"{ahead:%Y-%m-%d-%H:00}"}
