"""Report, without Spark, which landing files wait, which ones nothing reads, and which ones no batch accounts for.

The report starts from the folder, not from the checkpoint: each entry has been read, waits, or has a reason why nothing reads it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from spark_jobs.config import Settings
from spark_jobs.errors import UsageError
from spark_jobs.ingest.files.checkpoint import planned_at_ms, read_batch_files, read_finished_batches, read_finished_files
from spark_jobs.ingest.files.landing import MAX_STRAYS, Entry, Reason, name_below, reason_of, walk_landing
from spark_jobs.lake.checkpoint_copy import checkpoints_to_read
from spark_jobs.lake.landing_view import arrived_at, refresh_landing, whole_time
from spark_jobs.lake.log import Commit, DeltaLog
from spark_jobs.lake.replaced_files import ReplacedFiles
from spark_jobs.lake.tables import EVENTS, ORDERS, STREAMS
from spark_jobs.texts import counted, printable

_EXAMPLES = 3
_ACCEPTED = {"events": EVENTS, "orders": ORDERS}


@dataclass(frozen=True)
class WaitingFiles:
    """Files of one source that no finished batch has read. ``waiting_since`` is when the first was renamed into place."""

    stream: str
    region: str
    files: int
    waiting_since: datetime
    oldest: str


@dataclass(frozen=True)
class IgnoredFiles:
    """Files that nothing reads, by source (``<stream>/<region>``, a stream, ``campaigns``, ``landing``) and reason."""

    source: str
    reason: str
    meaning: str
    files: int
    examples: list[str]


@dataclass(frozen=True)
class LandingReport:
    """Files that wait and files that are ignored. Unless ``is_complete``, there are more ignored files than were counted."""

    waiting: list[WaitingFiles] = field(default_factory=list)
    ignored: list[IgnoredFiles] = field(default_factory=list)
    is_complete: bool = True

    @property
    def ignored_files(self) -> int:
        """How many entries are ignored."""
        return sum(found.files for found in self.ignored)

    @property
    def ignored_text(self) -> str:
        """The ignored files, on one line."""
        return "; ".join(f"{one.files} in {one.source} ({one.meaning}), such as {one.examples[0]}" for one in self.ignored)


def read_landing(settings: Settings) -> LandingReport:
    """Compare the landing folder with the checkpoints.

    Raises TableCorruptionError if a checkpoint is unreadable, StoreError if the landing folder is in a store that does not answer.
    """
    refresh_landing(settings)
    landing = settings.landing_path
    read = {name: ms for stream in STREAMS for name, ms in _finished_names(settings, stream).items()}
    waiting: dict[str, list[Entry]] = {}
    ignored: dict[tuple[str, Reason], list[str]] = {}
    replaced: ReplacedFiles | None = None
    for entry in walk_landing(landing):
        reason = entry.reason
        was = read.get(entry.name, entry.modified_ms)
        if reason is None and was != entry.modified_ms:
            replaced = replaced or ReplacedFiles(settings)  # only an object gets a new time when an erasure replaces it
            is_same = whole_time(settings, entry.modified_ms) in replaced.times(entry.name, was)
            reason = None if is_same else Reason.CHANGED
        if reason is not None:
            ignored.setdefault((entry.source, reason), []).append(entry.name)
        elif entry.source.partition("/")[0] in STREAMS and entry.name not in read:
            waiting.setdefault(entry.source, []).append(entry)
    return LandingReport(
        [_waiting(settings, source, found) for source, found in sorted(waiting.items())],
        [
            IgnoredFiles(source, reason, reason.text, len(names), [printable(name) for name in sorted(names)[:_EXAMPLES]])
            for (source, reason), names in sorted(ignored.items())
        ],
        is_complete=sum(len(names) for (_, reason), names in ignored.items() if reason is not Reason.CHANGED) < MAX_STRAYS,
    )


def _waiting(settings: Settings, source: str, found: list[Entry]) -> WaitingFiles:
    stream, _, region = source.partition("/")
    arrived, name = min((arrived_at(settings, entry.modified_ms / 1000, entry.arrived), entry.name) for entry in found)
    return WaitingFiles(stream, region, len(found), datetime.fromtimestamp(arrived, UTC), printable(name))


def unaccounted_files(settings: Settings, stream: str, since: datetime | None = None) -> list[str]:
    """Return the landing files that the checkpoint counts as read, but that no plan in the table's commits names.

    Spark does not list them again. With ``since`` only files of batches planned then or later count, and this does not read the
    older log. Of a log that was cleaned, only the remaining commits count.
    """
    planned_ms = _planned_names(settings, stream, since)
    landing = settings.landing_path
    left = {n for n in planned_ms if os.path.lexists(landing / n) and reason_of(landing, n) is None}
    oldest: Commit | None = None
    for commit in DeltaLog(settings.table_uri(_ACCEPTED[stream].name)).commits_backwards() if left else ():
        left -= _names_of_plan(commit, settings, stream)
        oldest = commit
        if not left or (since is not None and _committed_ms(commit) < since.timestamp() * 1000):
            break
    if oldest is None or oldest.version == 0:
        return sorted(left)
    cut = _committed_ms(oldest)
    return sorted(name for name in left if (planned_ms[name] or 0) > cut)


def finished_plans(settings: Settings, stream: str) -> tuple[datetime, datetime] | None:
    """Return when the oldest and the newest finished batch were planned, of those whose plan the checkpoint still has."""
    checkpoint = checkpoints_to_read(settings) / stream
    finished = read_finished_batches(checkpoint)
    if not finished:
        return None
    first, last = (datetime.fromtimestamp(planned_at_ms(checkpoint, batch) / 1000, UTC) for batch in (finished[0], finished[-1]))
    return first, last


def _planned_names(settings: Settings, stream: str, since: datetime | None) -> dict[str, int | None]:
    """Return the files of finished batches, each with the time (ms) of its batch's plan; None if that is unknown."""
    checkpoint = checkpoints_to_read(settings) / stream
    found: dict[str, int | None] = {} if since is not None else dict.fromkeys(_finished_names(settings, stream))
    for batch_id in reversed(read_finished_batches(checkpoint)):
        if since is not None and planned_at_ms(checkpoint, batch_id) < since.timestamp() * 1000:
            break
        batch = read_batch_files(checkpoint, batch_id)
        found |= {name_below(file.path, settings, stream): batch.planned_us // 1000 for file in batch.files}
    return found


def _finished_names(settings: Settings, stream: str) -> dict[str, int]:
    """Return the files that the checkpoint counts as read, each with its time of modification then (ms)."""
    finished = read_finished_files(checkpoints_to_read(settings) / stream)
    folder = f"{settings.landing_path}/"
    place = f"{folder}{stream}/"
    return {
        path[len(folder) :] if path.startswith(place) else name_below(path, settings, stream): ms for path, ms in finished.items()
    }


def _names_of_plan(commit: Commit, settings: Settings, stream: str) -> set[str]:
    """Return the files of the batch, or of the repair, that made a commit."""
    try:
        return {name_below(str(file[1]), settings, stream) for file in commit.metadata["files"]}
    except (KeyError, TypeError, IndexError):
        return set()  # a compaction, a correction or another tool made the commit


def _committed_ms(commit: Commit) -> int:
    return int(commit.info.get("timestamp", 0))


def look_into_landing(settings: Settings) -> list[str]:
    """Return the notices of an ingest at its start about files that nothing reads: one line, or none.

    Raises UsageError for a link that leads back into the landing folder: Spark follows it, and several would make it list forever.
    """
    report = read_landing(settings)
    if not report.ignored:
        return []
    landing = settings.landing_path
    for entry in walk_landing(landing):
        target = Path(os.path.realpath(landing / entry.name)) if entry.reason is Reason.SYMLINK else None
        if target is None or entry.source == "landing" or not target.is_dir():
            continue
        if target.is_relative_to(landing) or landing.is_relative_to(target):
            raise UsageError(
                f"{printable(entry.name)} is a link to a folder that leads back into the landing folder {landing}",
                hint="remove it: no link is followed there (docs/runbooks/ignored-files.md)",
            )
    least = "" if report.is_complete else "at least "
    count = counted(report.ignored_files, "file")
    return [f"{least}{count} where nothing reads them: {report.ignored_text}; docs/runbooks/ignored-files.md"]
