"""Deletes data files that no reader needs, removes damaged ones from their tables, and takes texts out of commits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from urllib.parse import unquote

from spark_jobs.lake.commit import committing
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.places import open_place
from spark_jobs.lake.reading import open_table, table_files
from spark_jobs.lake.scratch import scratch_folder
from spark_jobs.lake.tables import Table
from spark_jobs.steps import Step, durable


def unneeded_files(lake: Lake, table: Table, retention_hours: int, keep_versions: Sequence[int]) -> dict[str, int]:
    """Return the sizes in bytes, by path, of the files that a table's newest version and ``keep_versions`` do not need.

    Only existing files that were removed (or, if no commit names them, written) longer ago than ``retention_hours``: delta-rs also
    lists files that an earlier vacuum deleted.
    """
    paths = _vacuum(lake, table, retention_hours, keep_versions, dry_run=True)
    place = open_place(lake.uri(table))
    return {path: found.size for path in paths if (found := place.find(unquote(path))) is not None}


def delete_unneeded_files(lake: Lake, table: Table, retention_hours: int, keep_versions: Sequence[int]) -> list[str]:
    """Delete what `unneeded_files` lists, with two commits in the log; returns the files."""
    return _vacuum(lake, table, retention_hours, keep_versions, dry_run=False)


def _vacuum(lake: Lake, table: Table, retention_hours: int, keep_versions: Sequence[int], *, dry_run: bool) -> list[str]:
    held = open_table(lake.uri(table))
    deleted: list[str] = []
    with committing(lake.uri(table), held, Step.VACUUM, files=()) as properties:
        deleted += held.vacuum(
            retention_hours=retention_hours,
            dry_run=dry_run,
            enforce_retention_duration=False,  # the caller has its own minimum
            full=True,  # files of killed batches too, which no commit names
            keep_versions=list(keep_versions),
            commit_properties=properties,
        )
    return deleted


def take_files_out(lake: Lake, table: Table, paths: Collection[str], metadata: Mapping[str, object]) -> None:
    """Remove data files, named as in the log, from a table; older versions keep them. ``metadata`` says why."""
    held = open_table(lake.uri(table))
    removed = [file for file in table_files(held) if file.path in paths]
    lake.commit(table, Step.DAMAGE_REMOVED, base=int(held.version()), remove=removed, metadata=metadata)


def files_of_older_versions(lake: Lake, table: Table) -> list[str]:
    """Return the data files in a table's folder that its newest version does not have, by their names there."""
    if not lake.exists(table):
        return []
    current = {unquote(path) for path in lake.pin(table).paths(table)}
    names = (file.name for file in open_place(lake.uri(table)).list())
    return [name for name in names if name.endswith(".parquet") and not name.startswith("_delta_log/") and name not in current]


def delete_older_files(lake: Lake, table: Table, names: Sequence[str], number: int) -> None:
    """Delete some of `files_of_older_versions` at once; versions that need them are gone then. ``number`` names the step."""
    if names:
        with durable(Step.ERASED_VERSIONS, number):
            open_place(lake.uri(table)).delete(names)


def rewrite_commits(lake: Lake, table: Table, rewrite: Callable[[bytes], bytes], number: int) -> None:
    """Replace the commits of a table's log that ``rewrite`` changes.

    It may change texts for people, and nothing that a reader reads. ``number`` names the step for the crash tests.
    """
    place = open_place(lake.uri(table))
    with scratch_folder(lake.settings, "commits-") as folder:
        for found in place.list("_delta_log"):
            data = place.read(found.name) if found.name.endswith(".json") else b""
            made = rewrite(data)
            if made != data:
                (folder / "new").write_bytes(made)
                with durable(Step.ERASED_COMMIT, number):
                    place.rewrite(folder / "new", found)
