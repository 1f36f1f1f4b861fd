"""Sets aside a last commit that a power cut tore, before a command writes.

Commits are synced before a job builds on them (``commit.py``), so a last commit that is empty, truncated or without its data files
was never acknowledged, and its writer repeats it. The file is renamed to ``.torn-<version>-<time>.json``; nothing is deleted.
Damage in the middle of a log raises an error that names ``adtally fsck``.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from urllib.parse import unquote

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import TableCorruptionError
from spark_jobs.lake.locations import local_path
from spark_jobs.lake.locks import TORN, exclusive
from spark_jobs.lake.log import RUN_KEY, Commit, DeltaLog
from spark_jobs.lake.tables import BATCH_LEDGER, ORDERS, TABLES

_MOST_TORN = 3  # commits in flight at once: of a batch, a compaction, a correction
_MAGIC = b"PAR1"


def mend_tables(settings: Settings) -> list[str]:
    """Set aside the torn last commits of all tables; returns one line for each, and logs it as a warning.

    Safe while others write, because a commit appears whole. Raises TableCorruptionError if a log is damaged otherwise.
    """
    lines: list[str] = []
    if local_path(settings.lakehouse_uri) is None:
        return lines
    for step in (_set_aside_tail, _set_aside_checkpoint, _set_aside_without_data):  # each reads what the previous one left
        for name in TABLES:
            lines += step(settings, name)
    for line in lines:
        logging.getLogger("adtally").warning("adtally: %s", line)
    for name in TABLES:
        DeltaLog(settings.table_uri(name)).latest_version()
    return lines


def _set_aside_tail(settings: Settings, name: str) -> list[str]:
    log = DeltaLog(settings.table_uri(name))
    faults = log.tail_faults()
    if len(faults) > _MOST_TORN:
        raise TableCorruptionError(
            f"the last {len(faults)} commits of table {name} cannot be read, from {faults[0].path} on",
            hint="`adtally fsck` says what is lost and repairs it; docs/runbooks/power-cut.md",
        )
    if not faults:
        return []
    with exclusive(settings, TORN):  # if two processes start at once, the second reads what the first left
        return [_set_aside(settings, name, fault.version, fault.problem) for fault in reversed(log.tail_faults())]


def _set_aside_without_data(settings: Settings, name: str) -> list[str]:
    """Set aside a merge or a compaction, whose files delta-rs writes, if a file is incomplete and no job built on it."""
    log = DeltaLog(settings.table_uri(name))

    def torn() -> Commit | None:
        newest = log.latest_version()
        commit = None if newest is None else log.commit(newest)
        if commit is None or all(_is_whole(log.uri, action) for action in commit.added):
            return None
        is_merge = name == ORDERS.name and commit.txn is not None and not _is_in_ledger(settings, commit.txn)
        return commit if is_merge or _is_undone_compaction(log.uri, commit) else None

    if torn() is None:
        return []
    with exclusive(settings, TORN):
        commit = torn()
        return [] if commit is None else [_set_aside(settings, name, commit.version, "a data file of it is not there whole")]


def _set_aside_checkpoint(settings: Settings, name: str) -> list[str]:
    """Set aside an incomplete checkpoint of the log, and the file that names it: the log has the same content."""
    folder = Path(settings.table_uri(name)) / "_delta_log"
    torn = [path for path in sorted(folder.glob("*.checkpoint*.parquet"))[-1:] if not _ends_as_parquet(path)]
    hint = folder / "_last_checkpoint"
    if hint.exists() and (torn or not _is_json(hint)):
        torn.append(hint)
    for path in torn:
        disk.replace(path, path.with_name(f".torn-{path.name}-{time.time_ns()}"))
    return [f"table {name}: {path.name} of its log was torn by a power cut and set aside" for path in torn]


def _set_aside(settings: Settings, name: str, version: int, problem: str) -> str:
    path = Path(DeltaLog(settings.table_uri(name)).commit_path(version))
    disk.replace(path, path.with_name(f".torn-{version:020d}-{time.time_ns()}.json"))
    return f"table {name}: version {version} was torn by a power cut ({problem}) and set aside; what it did is done again"


def _is_in_ledger(settings: Settings, transaction: tuple[str, int]) -> bool:
    ledger = DeltaLog(settings.table_uri(BATCH_LEDGER.name))
    return any(
        commit.txn is not None and commit.txn[0] == transaction[0] and commit.txn[1] >= transaction[1]
        for commit in ledger.commits_backwards()
    )


def _is_undone_compaction(uri: str, commit: Commit) -> bool:
    """Return whether a commit is a compaction whose source files all exist."""
    return RUN_KEY in commit.info and all((Path(uri) / unquote(action["path"])).exists() for action in commit.removed)


def _is_whole(uri: str, action: dict[str, object]) -> bool:
    path = Path(uri) / unquote(str(action["path"]))
    return path.exists() and path.stat().st_size == action.get("size")


def _ends_as_parquet(path: Path) -> bool:
    with path.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, size - len(_MAGIC)))
        return size > 2 * len(_MAGIC) and handle.read() == _MAGIC


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text("utf-8")), dict)
    except ValueError:
        return False
