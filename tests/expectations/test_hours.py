"""Each expectation of an hour is broken once, in data that is clean but for that."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from expectations import SUITES, Severity, related_tables
from expectations.errors import UnknownTableError, UnreadableTableError
from spark_jobs.lake.tables import TABLES
from tests.expectations.small_lake import EMPTY_HOUR, HOUR, NEXT_HOUR, Lake, validated

CASES: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "cases" / "expectations" / "hours.json").read_text("utf-8")
)


@pytest.fixture
def made(tmp_path: Path) -> Lake:
    return Lake(tmp_path)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    lake = Lake(tmp_path_factory.mktemp("clean"))
    lake.write()
    return lake


def validate(made: Lake, table: str, hour: Any = HOUR, **options: Any) -> Any:
    return validated(table, made.uri(table), None, hour, related=made.related(), **options)


@pytest.mark.parametrize(("table", "case"), [pytest.param(t, c, id=f"{t}: {c['name']}") for t in CASES for c in CASES[t]])
def test_broken_data_fails_its_expectations_and_no_others(made: Lake, table: str, case: dict[str, Any]) -> None:
    made.sql(case["sql"])
    made.write()
    found = validate(made, table)
    assert {result.name for result in found.failed} == set(case["fails"])
    assert not found.success
    assert found.error_failed == any(result.severity is Severity.ERROR for result in found.failed)
    for name, row in case.get("rows", {}).items():
        failed = next(result for result in found.failed if result.name == name)
        assert row in failed.failing_rows
    for result in found.failed:
        assert result.observed and result.observed > 0
        assert result.failing_rows, result.name


@pytest.mark.parametrize("table", SUITES)
def test_every_expectation_is_broken_by_a_case(table: str) -> None:
    broken = {name for case in CASES[table] for name in case["fails"]}
    against_the_week = {each for each in SUITES[table].names if each.endswith((".drift", ".volume"))}
    unseen = set(SUITES[table].names) - against_the_week - broken
    # an hour is selected by these, so a row without them is in none; the ledger's null hour is a value
    assert unseen == {"orders": {"order_time.not_null"}, "minute_metrics": {"event_minute.not_null"}}.get(table, set())


@pytest.mark.parametrize("hour", [HOUR, NEXT_HOUR, EMPTY_HOUR], ids=["an hour", "the hour beside", "an hour without rows"])
@pytest.mark.parametrize("table", SUITES)
def test_clean_hours_are_valid(clean: Lake, table: str, hour: datetime) -> None:
    found = validate(clean, table, hour)
    assert found.failed == []
    assert found.success
    assert not found.error_failed
    assert (found.rows == 0) == (hour == EMPTY_HOUR or (table == "orders" and hour == NEXT_HOUR))
    assert {result.name for result in found.results} == set(SUITES[table].names)


def test_an_hour_that_is_empty_though_the_ledger_has_accepted_records_is_wrong(made: Lake) -> None:
    made.sql(["delete from events where event_hour = 10"])
    made.write()
    found = validate(made, "events")
    assert found.rows == 0
    assert {result.name for result in found.failed} == {"accepted.is_what_the_ledger_says", "spend_nanos.is_what_the_ledger_says"}


def test_late_events_and_corrections_are_valid(made: Lake) -> None:
    moved = "'e-late' as event_id, timestamptz '2025-06-02 14:00:00Z' as received_at, true as is_late, 5 as _batch_id"
    booked = "1 as offered, 1 as accepted, 0 as duplicate, 0 as rejected, 1500 as spend_nanos, 5 as _batch_id"
    hour = "event_hour = timestamptz '2025-06-02 10:00:00Z'"
    undone = "-impressions as impressions, -spend_nanos as spend_nanos, 'r-1' as _run_id"
    counts = "0 as offered, -1 as accepted, 1 as duplicate, 0 as rejected, -1500 as spend_nanos, 'r-1' as _run_id"
    new = "uuid()::varchar as record_uuid"
    made.sql(
        [
            f"insert into events select * replace ({moved}) from events where event_id = 'e-4'",
            f"insert into minute_metrics select * replace ({new}, 5 as _batch_id) from minute_metrics "
            "where event_minute = timestamptz '2025-06-02 10:20:00Z'",
            f"insert into batch_ledger select * replace ({booked}) from batch_ledger where region = 'eu' and {hour}",
            # a repair takes an event back that was counted though it had been resent
            "delete from events where event_id = 'e-1'",
            f"insert into minute_metrics select * replace ({new}, {undone}) from minute_metrics "
            "where event_minute = timestamptz '2025-06-02 10:05:00Z'",
            f"insert into batch_ledger select * replace ({counts}) from batch_ledger where region = 'us' and {hour}",
        ]
    )
    made.write()
    for table in SUITES:
        assert validate(made, table).failed == []


def test_the_length_of_an_id_is_in_characters(made: Lake) -> None:
    made.sql(["update events set event_id = repeat('é', 128) where event_id = 'e-4'"])
    made.write()
    assert validate(made, "events").success
    made.sql(["update events set event_id = repeat('é', 129) where event_id like 'é%'"])
    made.write()
    assert [result.name for result in validate(made, "events").failed] == ["event_id.length"]


def test_a_version_is_judged_as_it_was(made: Lake) -> None:
    made.write()
    made.sql(["update events set price_micros = -1 where event_id = 'e-9'"])
    made.write()
    uri = made.uri("events")
    versions = {version: validated("events", uri, version, HOUR, related=made.related()) for version in (0, 1)}
    assert versions[0].success
    assert [result.name for result in versions[1].failed] == ["price_micros.range"]
    assert DeltaTable(uri).version() == 1


def test_what_needs_a_table_that_is_not_given_is_not_judged(clean: Lake) -> None:
    found = validated("events", clean.uri("events"), None, HOUR, related=clean.related("campaigns"))
    unjudged = [result for result in found.results if result.observed is None]
    assert found.success
    assert {"accepted.is_what_the_ledger_says", "_batch_id.is_complete"} <= {result.name for result in unjudged}
    assert all("not judged: batch_ledger was not given" in r.expected for r in unjudged if r.name.startswith("accepted"))
    assert set(related_tables("events")) == {"batch_ledger", "campaigns"}


def test_what_cannot_be_read_is_told(clean: Lake, tmp_path: Path) -> None:
    with pytest.raises(UnknownTableError, match="there is no suite for 'event': there are suites for events, orders"):
        validated("event", clean.uri("events"), None, HOUR)
    with pytest.raises(UnreadableTableError, match="events at version None cannot be checked"):
        validated("events", str(tmp_path / "nowhere"), None, HOUR)
    with pytest.raises(UnreadableTableError, match="events at version 99 cannot be checked"):
        validated("events", clean.uri("events"), 99, HOUR)


@pytest.mark.parametrize("table", SUITES)
def test_suites_declare_the_columns_of_the_registry(table: str) -> None:
    kinds = {"STRING": "VARCHAR", "TIMESTAMP": "TIMESTAMP WITH TIME ZONE", "INT": "INTEGER", "ARRAY<STRING>": "VARCHAR[]"}
    assert dict(SUITES[table].columns) == {name: kinds.get(kind, kind) for name, kind in TABLES[table].types.items()}
