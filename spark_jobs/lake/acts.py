"""Writes the audit log: who repaired, closed, released, accepted, erased, reviewed or restored what, when and why.

An act that ends in one commit carries its entry in the commit itself (`act_info`), so there is never the one without the other.
`complete_audit_log` then copies the entries of such commits to table `audit_log`. If a process is killed in between, the next
act, the next billing run or the end of the next ingest does it. An act without such a commit calls `record_act`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from spark_jobs.actor import present_actor
from spark_jobs.config import Settings
from spark_jobs.lake.chain import Head, append_linked
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import NONCE_KEY, Commit
from spark_jobs.lake.tables import (
    AUDIT_LOG,
    HOUR_CLOSINGS,
    HOUR_RULES,
    RAW_RETIREMENTS,
    RECONCILIATIONS,
    RELEASES,
    RESTATEMENTS,
    RULE_SETS,
    SOURCE_GAPS,
    TRAFFIC_REVIEWS,
)
from spark_jobs.steps import Step
from spark_jobs.units import from_micros, to_micros

_CARRIERS = (
    HOUR_CLOSINGS,
    SOURCE_GAPS,
    RELEASES,
    RULE_SETS,
    RESTATEMENTS,
    HOUR_RULES,
    TRAFFIC_REVIEWS,
    RECONCILIATIONS,
    RAW_RETIREMENTS,
)
"""The tables whose commits may carry the entry of an act."""

_INFO_KEY = "adtallyAct"
_METADATA = "read"  # of a commit of audit_log: up to which version of each of the _CARRIERS the acts are in it
_COMMITS_UNREAD = 200  # after so many commits without an act, a commit without entries stores how far they were read


class Act(StrEnum):
    """What was done."""

    CLOSE = "close"  # hours, by hand
    ACCEPT_GAP = "accept_gap"
    RELEASE = "release"  # a quarantined file
    RULES = "rules"  # a rule set is used for the first time
    REVIEW = "review"  # marks of invalid traffic changed
    REPAIR = "repair"
    BACKFILL = "backfill"
    ERASE = "erase"  # a person
    RESTORE = "restore"  # damaged files are taken out and their rows brought back
    RETIRE = "retire"  # raw input is archived or dropped


@dataclass(frozen=True)
class AuditEntry:
    """A row of `audit_log`. ``position`` None: its act is done, and the next run will write it into the table."""

    entry_id: str
    act: str
    user_name: str
    host: str
    command: str
    run_id: str | None
    reason: str
    arguments: str
    table_name: str | None
    table_version: int | None
    acted_at: datetime
    position: int | None = None

    def to_row(self) -> dict[str, Any]:
        """Return the row, without its place in the chain."""
        row = asdict(self)
        del row["position"]
        return row


def act_info(
    act: Act, *, reason: str, arguments: Mapping[str, object], now: datetime, run_id: str | None = None, by: str | None = None
) -> dict[str, str]:
    """Return what `Lake.commit` is to write as ``info`` into the commit of an act. ``by`` replaces the name of the user."""
    return {_INFO_KEY: json.dumps(_described(act, reason, arguments, now, run_id, by))}


def record_act(
    settings: Settings,
    act: Act,
    entry_id: str,
    *,
    reason: str,
    arguments: Mapping[str, object],
    now: datetime,
    run_id: str | None = None,
    table_version: tuple[str, int] | None = None,
) -> None:
    """Write the entry of an act, once per ``entry_id``: a killed act that runs again calls it with the same one.

    ``table_version`` is the table and the version that the act made; not one of _CARRIERS, whose commits carry their acts. Personal
    data must not be in ``reason`` or ``arguments``.
    """
    table, version = table_version or (None, None)
    content = _described(act, reason, arguments, now, run_id, None)
    entry = _entry(entry_id, content, table, version)
    lake = Lake(settings)

    def missing(_: Head) -> list[dict[str, Any]]:
        return [] if entry_id in lake.rows(AUDIT_LOG, "entry_id")["entry_id"].to_pylist() else [entry.to_row()]

    append_linked(lake, AUDIT_LOG, missing, Step.AUDIT_LOG)


def complete_audit_log(settings: Settings) -> None:
    """Copy the entries of acts that the audit log does not have yet. A second call changes nothing."""
    lake = Lake(settings)
    if not lake.exists(AUDIT_LOG):
        return
    state = _unwritten(lake)
    if not state.entries and state.commits < _COMMITS_UNREAD:
        return

    def missing(_: Head) -> list[dict[str, Any]]:
        nonlocal state
        state = _unwritten(lake)  # another process may have been faster
        return [entry.to_row() for entry in state.entries]

    if state.entries:
        append_linked(lake, AUDIT_LOG, missing, Step.AUDIT_LOG)
    else:
        lake.append(AUDIT_LOG, AUDIT_LOG.schema.empty_table(), Step.AUDIT_LOG, metadata={_METADATA: state.read})


def read_audit_log(settings: Settings) -> list[AuditEntry]:
    """Return all entries, the oldest first; last those whose acts are done and which the next run will write."""
    lake = Lake(settings)
    names = [name for name in AuditEntry.__dataclass_fields__ if name != "position"]
    rows = sorted(lake.rows(AUDIT_LOG).to_pylist(), key=lambda row: row["chain_position"] or 0)
    written = [AuditEntry(**{name: row[name] for name in names}, position=row["chain_position"]) for row in rows]
    return [*written, *_unwritten(lake).entries]


@dataclass(frozen=True)
class _Unwritten:
    """Acts whose entries are missing, up to which versions that is known, and the commits that were read for it."""

    entries: list[AuditEntry]
    read: dict[str, int]
    commits: int


def _unwritten(lake: Lake) -> _Unwritten:
    read: dict[str, int] = dict(_noted(lake))
    for row in lake.rows(AUDIT_LOG, "table_name", "table_version").to_pylist():
        if row["table_name"] is not None:
            read[row["table_name"]] = max(row["table_version"], read.get(row["table_name"], -1))
    found: list[AuditEntry] = []
    commits = 0
    for table in _CARRIERS:
        until, name = lake.version(table), table.name
        for commit in lake.log(table).commits_backwards(until) if until is not None else ():
            if commit.version <= read.get(name, -1):
                break
            commits += 1
            found += _carried(commit, name)
        if until is not None:
            read[name] = until
    return _Unwritten(sorted(found, key=lambda entry: (entry.acted_at, entry.entry_id)), read, commits)


def _noted(lake: Lake) -> dict[str, int]:
    if not lake.exists(AUDIT_LOG):
        return {}
    commits = lake.log(AUDIT_LOG).commits_backwards()
    return next((commit.metadata[_METADATA] for commit in commits if _METADATA in commit.metadata), {})


def _carried(commit: Commit, table: str) -> Iterator[AuditEntry]:
    if _INFO_KEY in commit.info:
        yield _entry(str(commit.info[NONCE_KEY]), json.loads(commit.info[_INFO_KEY]), table, commit.version)


def _described(
    act: Act, reason: str, arguments: Mapping[str, object], now: datetime, run_id: str | None, by: str | None
) -> dict[str, Any]:
    actor = present_actor()
    return {
        "act": act.value,
        "user_name": by or actor.user_name,
        "host": actor.host,
        "command": actor.command,
        "run_id": actor.run_id or run_id,
        "reason": reason,
        "arguments": json.dumps(arguments, sort_keys=True, default=str, ensure_ascii=False),
        "acted_us": to_micros(now),
    }


def _entry(entry_id: str, content: dict[str, Any], table: str | None, version: int | None) -> AuditEntry:
    content = dict(content)
    acted_at = from_micros(content.pop("acted_us"))
    return AuditEntry(entry_id=entry_id, table_name=table, table_version=version, acted_at=acted_at, **content)
