"""Remembers up to which versions the tables agree with each other, so that `adtally status` checks the batches after them.

A file of HOME has the versions. It is derived: without it, or if a commit is another one than then, or removed rows, all batches
are checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from spark_jobs import disk
from spark_jobs.lake.lake import Snapshot
from spark_jobs.lake.log import Commit, commit_identity
from spark_jobs.lake.tables import (
    BATCH_LEDGER,
    EVENTS,
    MINUTE_METRICS,
    ORDERS,
    REJECTED_EVENTS,
    REJECTED_ORDERS,
    STREAMS,
    Table,
)

_STREAM_OF = {EVENTS: "events", MINUTE_METRICS: "events", REJECTED_EVENTS: "events", REJECTED_ORDERS: "orders"}
_ALL = 2**62


@dataclass(frozen=True)
class Unchecked:
    """What was added or changed since the last check.

    ``first_batch``: by stream, the smallest number of a batch with such rows in the tables of one stream; 0: check all batches.
    ``ledger_added``: the data files of the ledger with such rows. An order has only the batch of its latest record, so orders are
    checked by a sum over all of them: ``records`` is the sum at the last check, and ``orders_added`` and ``orders_removed`` are the
    data files that changed it since. ``planned``: by stream, the plan of the newest batch that had finished at the last check.
    """

    first_batch: dict[str, int]
    ledger_added: list[str]
    records: int
    orders_added: list[str]
    orders_removed: list[str]
    planned: dict[str, datetime]


def everything(snapshot: Snapshot) -> Unchecked:
    """Return all rows as unchecked."""
    return Unchecked(dict.fromkeys(STREAMS, 0), [], 0, snapshot.paths(ORDERS) if ORDERS in snapshot else [], [], {})


def read_unchecked(snapshot: Snapshot) -> Unchecked:
    """Return what changed since the last check; everything if that is not known."""
    try:
        known = json.loads(_file(snapshot).read_text("utf-8"))
        first = dict.fromkeys(STREAMS, _ALL)
        for table, stream in _STREAM_OF.items():
            first[stream] = min([first[stream], *map(_first_batch, _added_since(snapshot, table, *known[table.name]))])
        of_orders = [commit for commit in _commits_since(snapshot, ORDERS, *known[ORDERS.name]) if commit.changes_rows]
        return Unchecked(
            first,
            [action["path"] for action in _added_since(snapshot, BATCH_LEDGER, *known[BATCH_LEDGER.name])],
            int(known["records"]),
            [path for commit in of_orders for path in commit.added_paths],
            [path for commit in of_orders for path in commit.removed_paths],
            {stream: datetime.fromisoformat(planned) for stream, planned in known["planned"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError):  # no file, or a commit or its statistics are missing
        return everything(snapshot)


def remember_checked(snapshot: Snapshot, records: int, planned: Mapping[str, datetime]) -> None:
    """Note that the tables agree with each other at these versions, the sum over all orders, and the newest finished plans.

    Does nothing where HOME cannot be written.
    """
    tables = (BATCH_LEDGER, *_STREAM_OF, ORDERS)
    if not all(table in snapshot for table in tables):
        return
    versions = {table.name: snapshot.version(table) for table in tables}
    known = {t.name: (versions[t.name], commit_identity(snapshot.lake.log(t).commit(versions[t.name]))) for t in tables}
    plans = {stream: at.isoformat() for stream, at in planned.items()}
    with suppress(OSError):
        disk.write_file(_file(snapshot), json.dumps({**known, "records": records, "planned": plans}).encode())


def _file(snapshot: Snapshot) -> Path:
    return snapshot.lake.settings.home_path / "checked_versions.json"


def _commits_since(snapshot: Snapshot, table: Table, version: int, identity: str) -> list[Commit]:
    """Return the commits after a version. Raises ValueError if the log lacks one, or has another commit as that version."""
    log, newest = snapshot.lake.log(table), snapshot.version(table)
    commits = log.commits(version - 1, newest) if version <= newest else None
    if not commits or commit_identity(commits[0]) != identity:
        raise ValueError("not every change since then is known")
    return commits[1:]


def _added_since(snapshot: Snapshot, table: Table, version: int, identity: str) -> list[dict[str, Any]]:
    """Return the files that were added after a version. Raises ValueError if they do not show all changes."""
    commits = _commits_since(snapshot, table, version, identity)
    if any(map(_removes_rows, commits)):
        raise ValueError("rows were removed")
    return [action for commit in commits for action in commit.data_added]


def _first_batch(action: dict[str, Any]) -> int:
    return int(json.loads(action["stats"])["minValues"]["_batch_id"])


def _removes_rows(commit: Commit) -> bool:
    """Return whether a commit may remove rows: not if it only adds some, or replaces the marks of some (a correction)."""
    return bool(commit.data_removed) and commit.metadata.get("keys") != "kept"
