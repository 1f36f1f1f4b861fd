"""Deleting data files that no reader needs, and taking damaged ones out of their tables, through delta-rs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from deltalake import DeltaTable

from spark_jobs.lake.commit import commit_files, committing
from spark_jobs.lake.reading import table_files
from spark_jobs.lake.tables import Table
from spark_jobs.steps import Step


def unneeded_files(uri: str, retention_hours: int, keep_versions: Sequence[int]) -> list[str]:
    """Files of a table that its newest version and ``keep_versions`` do not need, removed (or, where no commit names them, written)
    longer ago than ``retention_hours``.
    """
    return _vacuum(uri, retention_hours, keep_versions, dry_run=True)


def delete_unneeded_files(uri: str, retention_hours: int, keep_versions: Sequence[int]) -> list[str]:
    """Delete what ``unneeded_files`` lists; returns the files. The log gets two commits that say so."""
    return _vacuum(uri, retention_hours, keep_versions, dry_run=False)


def _vacuum(uri: str, retention_hours: int, keep_versions: Sequence[int], *, dry_run: bool) -> list[str]:
    held = DeltaTable(uri)
    with committing(uri, held, Step.VACUUM, files=()):
        return held.vacuum(
            retention_hours=retention_hours,
            dry_run=dry_run,
            enforce_retention_duration=False,  # the caller has a minimum of its own
            full=True,  # files of killed batches too, which no commit names
            keep_versions=list(keep_versions),
        )


def take_files_out(uri: str, table: Table, paths: Collection[str], metadata: Mapping[str, object]) -> None:
    """Commit that a table no longer has some data files, as paths in its log; older versions keep them. ``metadata`` says why."""
    held = DeltaTable(uri)
    removed = [file for file in table_files(held) if file.path in paths]
    commit_files(held, uri, table, Step.DAMAGE_REMOVED, remove=removed, metadata=metadata)
