"""What lies in the landing folder of a stream, and what the running query has seen and done of it."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from spark_jobs.audit.plans import landing_name
from spark_jobs.audit.store import RawFile
from spark_jobs.audit.worker import mtime_ms
from spark_jobs.config import Settings

_REGION = re.compile(r"[a-z0-9-]{1,32}")  # files of another folder are not read
_CLOCK_SLACK_NS = 10 * 10**9


@dataclass(frozen=True)
class LandedFile:
    """A file that follows the protocol. ``renamed_ns`` is the time of its last change of state: when it got its name, or later."""

    name: str
    raw: RawFile
    renamed_ns: int


@dataclass(frozen=True)
class RunningQuery:
    """The query that the checkpoint belongs to; ``query_id`` None: there is none.

    ``done`` are the batches that have ended, ``taken`` the names of the files of all of those.
    """

    query_id: str | None = None
    done: frozenset[int] = frozenset()
    taken: frozenset[str] = field(default=frozenset())


def landed_files(settings: Settings, stream: str) -> dict[str, LandedFile]:
    """The files at ``<stream>/<region>/<name>.jsonl[.gz]`` under no hidden name, by their names under the landing folder."""
    found = {}
    for region in _entries(settings.landing_path / stream):
        for path in _entries(Path(region.path)) if region.is_dir(follow_symlinks=False) else ():
            if path.name.endswith((".jsonl", ".jsonl.gz")) and path.is_file(follow_symlinks=False):
                with suppress(OSError, UnicodeEncodeError):  # gone meanwhile; a name that Spark cannot read either
                    name = f"{stream}/{region.name}/{path.name}"
                    name.encode("utf-8")
                    state = path.stat(follow_symlinks=False)
                    raw = RawFile(path.path, mtime_ms(state), state.st_size)
                    found[name] = LandedFile(name, raw, state.st_ctime_ns)
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    if folder.is_symlink():  # nothing below the landing folder is followed
        return []
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith((".", "_"))), key=lambda entry: entry.name)
    except OSError:
        return []


def read_query(settings: Settings, stream: str) -> RunningQuery:
    """What the checkpoint of a stream says. A checkpoint that cannot be read is none."""
    folder = settings.checkpoints_path / stream
    try:
        query_id = str(json.loads((folder / "metadata").read_text("utf-8"))["id"])
        done = frozenset(int(path.name) for path in (folder / "commits").glob("*") if path.name.isdecimal())
        if not done:
            return RunningQuery(query_id)
        offset = json.loads((folder / "offsets" / str(max(done))).read_text("utf-8").splitlines()[2])
        return RunningQuery(query_id, done, frozenset(_taken(folder / "sources" / "0", int(offset["logOffset"]))))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return RunningQuery()


def _taken(folder: Path, last: int) -> set[str]:
    names = set()
    for path in folder.glob("*"):
        if not path.name.removesuffix(".compact").isdecimal():
            continue
        for line in path.read_text("utf-8").splitlines()[1:]:
            entry = json.loads(line)
            if entry["batchId"] <= last:
                uri = urlsplit(entry["path"])
                names.add(landing_name(unquote(uri.path) if uri.scheme == "file" else entry["path"]))
    return names


def missed_files(landed: dict[str, LandedFile], planned: set[str], query: RunningQuery) -> list[LandedFile]:
    """Files that the running query went past though no batch has them; a file that only waits is none of them.

    Went past: the query has it in a batch that ended; or it has taken a file that got its name clearly later and stands behind it
    in the order of reading (time of modification), so that it was listed and left.
    """
    taken = [landed[name] for name in query.taken if name in landed]
    found = []
    for name, file in sorted(landed.items()):
        if name in planned or not _REGION.fullmatch(name.split("/")[1]):
            continue
        if name in query.taken or any(
            other.renamed_ns > file.renamed_ns + _CLOCK_SLACK_NS and other.raw.mtime_ms > file.raw.mtime_ms for other in taken
        ):
            found.append(file)
    return found
