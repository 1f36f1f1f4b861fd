"""The records of landing files and of Kafka's raw records, parsed once and kept under ADTALLY_HOME: a Parquet file each.

An entry of a landing file is keyed by the file's name under the landing folder, its time of modification and its size, so a changed
file is another file. Raw records are parsed by chunks of a partition's offsets, however batches were cut; an entry is keyed by the
partition, the offsets and the table. Entries are derived data: the folder may be deleted at any time, and what is damaged or of
another format is made again.
Several processes may work at once: an entry appears by rename, and two that make the same one make it alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from spark_jobs.audit.worker import FORMAT, METADATA_KEY, AnyTask, ChunkTask, ParseTask, is_as_said, parse_into
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError

Progress = Callable[[int, int], None]
# from so many bytes on, two processes are done sooner than this one: each takes half a second to start
_WORTH_PROCESSES = 48 * 1024 * 1024
_GZIP_FACTOR = 8  # about so much more is in it
_ABANDONED_SECONDS = 86_400.0


@dataclass(frozen=True)
class RawFile:
    """A landing file in one state: its absolute path, its time of modification in milliseconds and its size in bytes."""

    path: str
    mtime_ms: int
    size: int


@dataclass(frozen=True)
class RawChunk:
    """Offsets [start, end) of a Kafka partition (``name``: kafka/<cluster>/<topic>/<partition>), all of which the raw table has.

    ``paths`` lists the data files of table ``table_id`` that may hold some of them; it is asked only where they are to be parsed.
    """

    name: str
    start: int
    end: int
    table_id: str
    paths: Callable[[], list[str]] = field(compare=False, repr=False)


@dataclass(frozen=True)
class ParsedFile:
    """A landing file or a chunk of raw records, and the Parquet file of its records (``parser.record_schema``).

    ``name`` is the path under the landing folder, with ``/``, or that of the partition; ``region`` is the folder's, or the name of
    the cluster. ``min_us`` and ``max_us`` bound the times of all records that have
    one, rejected ones too; ``has_unknown_time`` says that some have none.
    """

    raw: RawFile | RawChunk
    name: str
    region: str
    parquet: Path
    records: int
    min_us: int | None
    max_us: int | None
    has_unknown_time: bool


def ensure_parsed(
    settings: Settings, stream: str, files: Sequence[RawFile | RawChunk], progress: Progress | None = None, *, verify: bool = False
) -> list[ParsedFile]:
    """The parsed form of ``files`` and chunks, in their order; made where the store does not have it.

    A file that the store does not have and that is gone, or has changed since ``raw`` was taken, is left out of the result.
    ``progress(done, total)`` is told of the bytes to read, as stored. ``verify`` reads what the store has to the end, against the
    checksums, so that no damage is taken for records. Raises AdtallyError where the records cannot be written.
    """
    tasks = [_task(settings, stream, raw) for raw in files]
    found = {task.target: entry for task in tasks if (entry := _entry(task, verify=verify)) and not entry["is_unreadable"]}
    missing = {task.target: (raw, task) for raw, task in zip(files, tasks, strict=True) if task.target not in found}
    present = [there for raw, task in missing.values() if (there := _there(raw, task)) is not None]
    _parse(present, progress)
    for task in present:
        if (entry := _entry(task)) is not None:
            found[task.target] = entry
    _forget_shorter([task for task in present if isinstance(task, ChunkTask)])
    return [_parsed(raw, task, found[task.target]) for raw, task in zip(files, tasks, strict=True) if task.target in found]


def _there(raw: RawFile | RawChunk, task: AnyTask) -> AnyTask | None:
    """A task that can be done; None for that of a landing file which is gone or changed."""
    if isinstance(task, ChunkTask) and isinstance(raw, RawChunk):
        return replace(task, paths=raw.paths())
    return task if isinstance(task, ParseTask) and is_as_said(task.path, task.mtime_ms, task.size) else None


def _forget_shorter(chunks: Sequence[ChunkTask]) -> None:
    """Remove the entries that new ones have taken the place of: of the same offsets, when there were fewer of them."""
    for task in chunks:
        target = Path(task.target)
        for path in target.parent.glob(f"{_stem(task.name, task.start, task.table_id)}-*.parquet"):
            end = path.stem.rpartition("-")[2]
            if end.isdecimal() and int(end) < task.end:
                path.unlink(missing_ok=True)


def _parse(tasks: Sequence[AnyTask], progress: Progress | None) -> None:
    """Make the entries of ``tasks``, in processes if there is enough to do."""
    total, done = sum(task.size for task in tasks), 0

    def on_read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    work = sum(task.size * (_GZIP_FACTOR if isinstance(task, ParseTask) and task.path.endswith(".gz") else 1) for task in tasks)
    workers = min(len(os.sched_getaffinity(0)), len(tasks))
    if workers > 1 and work >= _WORTH_PROCESSES:
        _parse_in_processes(tasks, workers, on_read)
        return
    for task in tasks:
        try:
            parse_into(task, on_read)
        except (OSError, pa.ArrowException, duckdb.Error) as error:
            raise _failed(f"{type(error).__name__}: {error}") from error


def _failed(reason: str) -> AdtallyError:
    return AdtallyError(f"the raw input cannot be parsed for the recount: {reason}")


def _parse_in_processes(tasks: Sequence[AnyTask], workers: int, on_read: Callable[[int], None]) -> None:
    """The largest files first, each process taking the next one when it is done with one."""
    waiting = deque(sorted(tasks, key=lambda task: -task.size))
    told: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    processes = [_start() for _ in range(workers)]
    threads = [threading.Thread(target=_feed, args=(process, waiting, told), daemon=True) for process in processes]
    try:
        for thread in threads:
            thread.start()
        busy = workers
        while busy:
            what, value = told.get()
            if what == "read":
                on_read(value)
            elif what == "error":
                raise _failed(value)
            else:
                busy -= 1
    finally:
        for process in processes:
            process.kill()
        for process, thread in zip(processes, threads, strict=True):
            process.wait()
            if thread.ident is not None:
                thread.join()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what was not flushed to a process that is gone
                        pipe.close()


def _start() -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    command = [sys.executable, "-m", "spark_jobs.audit.worker"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": path}
    )


def _next(waiting: deque[AnyTask]) -> AnyTask | None:
    try:
        return waiting.popleft()
    except IndexError:  # another thread has taken the last one
        return None


def _feed(process: subprocess.Popen[str], waiting: deque[AnyTask], told: SimpleQueue[tuple[str, Any]]) -> None:
    """Give a process one task after the other and pass on what it says, until there is none or it fails."""
    assert process.stdin is not None and process.stdout is not None
    try:
        while (task := _next(waiting)) is not None:
            print(json.dumps(asdict(task)), file=process.stdin, flush=True)
            for line in process.stdout:
                answer = json.loads(line)
                if "done" in answer:
                    break
                told.put(next(iter(answer.items())))
                if "error" in answer:
                    return
            else:
                told.put(("error", "a process that parses has ended before its time"))
                return
    except (OSError, ValueError) as error:
        told.put(("error", f"a process that parses has gone: {error}"))
    else:
        told.put(("end", None))


def prune(settings: Settings, stream: str, keep: Collection[RawFile | RawChunk]) -> int:
    """Remove the entries of files that are not in ``keep``, and what killed runs left behind; how many files were removed."""
    wanted = {_task(settings, stream, raw).target for raw in keep}
    removed = 0
    for path in _folder(settings, stream).glob("*"):
        is_abandoned = path.name.startswith(".") and time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
        if is_abandoned or (path.suffix == ".parquet" and not path.name.startswith(".") and str(path) not in wanted):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _folder(settings: Settings, stream: str) -> Path:
    return settings.recount_path / "parsed" / stream


def _task(settings: Settings, stream: str, raw: RawFile | RawChunk) -> AnyTask:
    if isinstance(raw, RawChunk):
        target = _folder(settings, stream) / f"{_stem(raw.name, raw.start, raw.table_id)}-{raw.end}.parquet"
        return ChunkTask(raw.name, raw.start, raw.end, raw.table_id, [], stream, str(target))
    path = Path(raw.path)
    name = path.relative_to(settings.landing_path).as_posix() if path.is_relative_to(settings.landing_path) else raw.path
    target = _folder(settings, stream) / f"{_hash(name, str(raw.mtime_ms), str(raw.size))}.parquet"
    return ParseTask(raw.path, name, raw.mtime_ms, raw.size, stream, path.parent.name, str(target))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:40]


def _stem(name: str, start: int, table_id: str) -> str:
    """What the entries of a chunk begin with, however far it reaches."""
    return f"{_hash(name, table_id)}-{start}"


def _entry(task: AnyTask, *, verify: bool = False) -> dict[str, Any] | None:
    """What an entry says of itself; None where there is none that can be used."""
    try:
        metadata = pq.read_metadata(task.target)
        entry: dict[str, Any] = json.loads((metadata.metadata or {})[METADATA_KEY])
        if verify:
            pq.read_table(task.target, page_checksum_verification=True)
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None
    said = (entry.get("format"), entry.get("name"), entry.get("state"), entry.get("records"))
    if said != (FORMAT, task.name, task.state, metadata.num_rows):
        return None
    return entry


def _parsed(raw: RawFile | RawChunk, task: AnyTask, entry: dict[str, Any]) -> ParsedFile:
    return ParsedFile(
        raw=raw,
        name=task.name,
        region=task.name.split("/")[1] if isinstance(task, ChunkTask) else task.region,
        parquet=Path(task.target),
        records=entry["records"],
        min_us=entry["min_us"],
        max_us=entry["max_us"],
        has_unknown_time=entry["has_unknown_time"],
    )
