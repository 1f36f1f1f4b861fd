"""Deleting data files that no reader needs, through delta-rs."""

from __future__ import annotations

from collections.abc import Sequence

from deltalake import DeltaTable

from spark_jobs.steps import Step, durable


def unneeded_files(uri: str, retention_hours: int, keep_versions: Sequence[int]) -> list[str]:
    """Files of a table that its newest version and ``keep_versions`` do not need, removed (or, where no commit names them, written)
    longer ago than ``retention_hours``.
    """
    return _vacuum(uri, retention_hours, keep_versions, dry_run=True)


def delete_unneeded_files(uri: str, retention_hours: int, keep_versions: Sequence[int]) -> list[str]:
    """Delete what ``unneeded_files`` lists; returns the files. The log gets two commits that say so."""
    return _vacuum(uri, retention_hours, keep_versions, dry_run=False)


def _vacuum(uri: str, retention_hours: int, keep_versions: Sequence[int], *, dry_run: bool) -> list[str]:
    with durable(Step.VACUUM):
        return DeltaTable(uri).vacuum(
            retention_hours=retention_hours,
            dry_run=dry_run,
            enforce_retention_duration=False,  # the caller has a minimum of its own
            full=True,  # files of killed batches too, which no commit names
            keep_versions=list(keep_versions),
        )
