"""Finds the newest transaction of an app id in a table, without reading the log of a store each time.

delta-rs reads all commits since the log's last checkpoint for each such question. On a store these are requests, so this process
remembers the answers and reads only the commits that came since.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from deltalake import DeltaTable

from spark_jobs.lake.locations import is_local
from spark_jobs.lake.log import DeltaLog

_MOST_COMMITS = 50  # to read one by one; more than that delta-rs reads faster, from a checkpoint


class _Known:
    """The newest transactions of one table at ``version``, by app id; None: the table has none.

    ``table_id`` differs between a table and one that was deleted and created again.
    """

    def __init__(self, table_id: str, version: int) -> None:
        self.table_id, self.version = table_id, version
        self.newest: dict[str, int | None] = {}


_guard = threading.Lock()
_known: dict[str, _Known] = {}


def newest_transaction(uri: str, held: DeltaTable, app_id: str) -> int | None:
    """Return the version of the newest transaction of ``app_id`` in the table at ``uri``, opened as ``held``; None if it has none.

    On a store the answer may be that of a later version, if this process has seen one.
    """
    if is_local(uri):
        return held.transaction_version(app_id)
    with _guard:
        known = _caught_up(uri, held)
        if app_id not in known.newest:
            found = held.transaction_version(app_id)
            if known.version > held.version():
                return found
            known.newest[app_id] = found
        return known.newest[app_id]


def note_transactions(uri: str, base: int, version: int, transactions: Mapping[str, int]) -> None:
    """Remember the transactions of a commit that this process made as ``version``, on version ``base``."""
    with _guard:
        known = _known.get(uri)
        if known is not None and known.version == base and version == base + 1:
            known.newest |= transactions
            known.version = version


def _caught_up(uri: str, held: DeltaTable) -> _Known:
    known, table_id, version = _known.get(uri), str(held.metadata().id), int(held.version())
    if known is not None and known.table_id == table_id:
        if version <= known.version:
            return known
        near = version <= known.version + _MOST_COMMITS
        commits = DeltaLog(uri).commits(known.version, version) if near else None
        if commits is not None:
            for commit in commits:
                known.newest |= {app_id: found for app_id, found in commit.transactions.items() if app_id in known.newest}
            known.version = version
            return known
    made = _known[uri] = _Known(table_id, version)
    return made
