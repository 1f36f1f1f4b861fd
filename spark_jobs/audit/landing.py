"""List the landing files of a stream, and find those that its query has passed over."""

from __future__ import annotations

import os
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from spark_jobs.audit.checkpoints import FileQuery
from spark_jobs.audit.contract import REGION_NAME
from spark_jobs.audit.store import RawFile
from spark_jobs.audit.worker import mtime_ms
from spark_jobs.config import Settings
from spark_jobs.lake.landing_view import refresh_landing, whole_time

_CLOCK_SLACK_NS = 10 * 10**9


@dataclass(frozen=True)
class LandedFile:
    """A file that follows the protocol. ``renamed_ns`` is the time of its last status change: its rename, or later."""

    name: str
    raw: RawFile
    renamed_ns: int


def landed_files(settings: Settings, stream: str) -> dict[str, LandedFile]:
    """List the files ``<stream>/<region>/<name>.jsonl[.gz]``, except hidden ones, by their names under the landing folder.

    Raises StoreError if the landing folder is in a store that cannot be listed.
    """
    refresh_landing(settings)
    found = {}
    for region in _entries(settings.landing_path / stream):
        for path in _entries(Path(region.path)) if region.is_dir(follow_symlinks=False) else ():
            if path.name.endswith((".jsonl", ".jsonl.gz")) and path.is_file(follow_symlinks=False):
                with suppress(OSError, UnicodeEncodeError):  # it has gone; or Spark cannot read the name either
                    name = f"{stream}/{region.name}/{path.name}"
                    name.encode("utf-8")
                    state = path.stat(follow_symlinks=False)
                    raw = RawFile(f"{settings.landing_uri}/{name}", whole_time(settings, mtime_ms(state)), state.st_size)
                    found[name] = LandedFile(name, raw, state.st_ctime_ns)
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    if folder.is_symlink():  # links below the landing folder are not followed
        return []
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith((".", "_"))), key=lambda entry: entry.name)
    except OSError:
        return []


def missed_files(
    landed: dict[str, LandedFile], planned: set[str], query: FileQuery, replaced: Container[str] = ()
) -> list[LandedFile]:
    """Return the files that the query has passed over: no plan has them, and they do not just wait.

    The query has passed over a file if it names the file in a finished batch. Or it has taken another file that was renamed clearly
    later and is later in the order of reading (time of modification), so it has listed the file and left it out. A file that an
    erasure ``replaced`` was renamed again by that, and shows nothing.
    """
    taken = [landed[name] for name in query.taken if name in landed and name not in replaced]

    def is_passed_over(file: LandedFile) -> bool:
        return file.name in query.taken or any(
            other.renamed_ns > file.renamed_ns + _CLOCK_SLACK_NS and other.raw.mtime_ms > file.raw.mtime_ms for other in taken
        )

    # The ingest does not read a folder with another kind of name.
    waiting = [file for name, file in sorted(landed.items()) if name not in planned and REGION_NAME.fullmatch(name.split("/")[1])]
    return [file for file in waiting if is_passed_over(file)]
