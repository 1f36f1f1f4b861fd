"""The audit log: each act has one entry, whatever is killed and whoever comes next."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from killed import run_code
from pydantic import BaseModel
from store import Location, variables

from spark_jobs.actor import Actor, acting_as
from spark_jobs.audit.verify import verify
from spark_jobs.billing.job import bill
from spark_jobs.config import Settings
from spark_jobs.corrections.run import Run, correcting
from spark_jobs.corrections.write_ahead import Correction, TableChange, write_ahead
from spark_jobs.lake import acts
from spark_jobs.lake.acts import Act, AuditEntry, complete_audit_log, read_audit_log, record_act
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import AUDIT_LOG, BATCH_LEDGER, HOUR_CLOSINGS, RECONCILIATIONS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.watermark import close_by_hand
from spark_jobs.rules.store import keep_rule_set
from spark_jobs.steps import CRASH_VARIABLE, Step

NOW = datetime(2025, 6, 10, tzinfo=UTC)
FIRST = datetime(2025, 6, 4, tzinfo=UTC)


def close(settings: Settings, hours: int = 0) -> None:
    close_by_hand(settings, FIRST + timedelta(hours=hours), reason="eu-west is down", closed_by="ann", now=NOW)


def entries(settings: Settings) -> list[tuple[str, int | None]]:
    return [(entry.act, entry.position) for entry in read_audit_log(settings)]


def is_whole(settings: Settings) -> bool:
    return not verify(settings, now=NOW).findings


def test_an_entry_says_who_did_what_when_and_why(settings: Settings) -> None:
    with acting_as(Actor("root", "machine-1", "adtally hours", "run-1")):
        close(settings)
    (entry,) = read_audit_log(settings)
    assert entry == AuditEntry(
        entry_id=entry.entry_id,
        act="close",
        user_name="ann",
        host="machine-1",
        command="adtally hours",
        run_id="run-1",
        reason="eu-west is down",
        arguments='{"through": "2025-06-04 00:00:00+00:00"}',
        table_name="hour_closings",
        table_version=Lake(settings).version(HOUR_CLOSINGS),
        acted_at=NOW,
        position=1,
    )


CLOSE = """
from datetime import UTC, datetime
from spark_jobs.config import load_settings
from spark_jobs.operate.watermark import close_by_hand
close_by_hand(load_settings(), datetime(2025, 6, 4, tzinfo=UTC), reason="r", closed_by="ann", now=datetime(2025, 6, 10, tzinfo=UTC))
"""


@pytest.mark.crash
@pytest.mark.parametrize(
    ("point", "closings"), [("before:hour_closings:0", 0), ("after:hour_closings:0", 1), ("before:audit_log:1", 1)]
)
def test_killed_between_act_and_entry_the_next_run_completes_it(place: Location, tmp_path: Path, point: str, closings: int) -> None:
    home = place.settings(tmp_path / "home", lease_seconds=2)
    ensure_tables(home)
    assert run_code(CLOSE, **variables(home), **{CRASH_VARIABLE: point}) == -signal.SIGKILL
    assert Lake(home).rows(HOUR_CLOSINGS, "reason").num_rows == closings
    assert Lake(home).rows(AUDIT_LOG, "act").num_rows == 0
    assert entries(home) == [("close", None)] * closings  # shown before it is in the table
    complete_audit_log(home)
    complete_audit_log(home)
    assert entries(home) == [("close", 1)] * closings
    assert is_whole(home)


def test_killed_after_the_entry_it_is_not_written_twice(settings: Settings) -> None:
    environment = {"ADTALLY_HOME": str(settings.home_path), CRASH_VARIABLE: "after:audit_log:1"}
    assert run_code(CLOSE, **environment) == -signal.SIGKILL
    assert entries(settings) == [("close", 1)]
    bill(settings, now=NOW)
    assert entries(settings) == [("close", 1)]


def test_a_correction_of_a_killed_run_has_the_entry_of_who_decided_it(settings: Settings) -> None:
    changes = [
        TableChange.append(table, pa.Table.from_pylist([dict.fromkeys(table.schema.names)], table.schema))
        for table in (BATCH_LEDGER, RECONCILIATIONS)
    ]
    run = Run("run-7", "repair", "recount differs from the tables", NOW)
    with acting_as(Actor("ann", "machine-1", "adtally reconcile")):
        write_ahead(settings, Correction(run.token, run.run_id, None, changes, act=run.act(changes)))
    with acting_as(Actor("bob", "machine-2", "adtally bill")), correcting(settings):
        pass
    (entry,) = read_audit_log(settings)
    assert (entry.act, entry.user_name, entry.command, entry.run_id) == ("repair", "ann", "adtally reconcile", "run-7")
    assert (entry.table_name, entry.position) == ("reconciliations", 1)
    assert json.loads(entry.arguments)["rows_removed_and_added"] == {"batch_ledger": [0, 1], "reconciliations": [0, 1]}


def test_a_review_that_changes_no_mark_is_no_act() -> None:
    assert Run("r", "review", "invalid traffic", NOW).act([]) == {}


def test_recorded_once_under_its_id(settings: Settings) -> None:
    for _ in range(2):
        record_act(settings, Act.ERASE, "erasure-1", reason="asked", arguments={"people": 1}, now=NOW, table_version=("events", 4))
    record_act(settings, Act.ERASE, "erasure-2", reason="asked", arguments={}, now=NOW)
    assert [(entry.entry_id, entry.table_version) for entry in read_audit_log(settings)] == [("erasure-1", 4), ("erasure-2", None)]
    assert is_whole(settings)


def test_acts_at_once_stand_one_after_the_other(settings: Settings) -> None:
    def act(number: int) -> None:
        record_act(settings, Act.RETIRE, f"act-{number}", reason="r", arguments={}, now=NOW)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(act, range(8)))
    assert [entry.position for entry in read_audit_log(settings)] == list(range(1, 9))
    assert is_whole(settings)


class Rules(BaseModel):
    """Some rules."""

    limit: int


def test_commits_without_an_act_are_read_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acts, "_COMMITS_UNREAD", 3)
    lake = Lake(settings)
    for _ in range(4):
        lake.append(RECONCILIATIONS, RECONCILIATIONS.schema.empty_table(), Step.RECONCILIATIONS)
    complete_audit_log(settings)
    version = lake.version(AUDIT_LOG)
    assert acts._unwritten(lake).commits == 0
    keep_rule_set(settings, "invalid_traffic", Rules(limit=3), NOW)
    close(settings)
    assert sorted(act for act, _ in entries(settings)) == ["close", "rules"]
    assert lake.version(AUDIT_LOG) == (version or 0) + 1
    assert is_whole(settings)
