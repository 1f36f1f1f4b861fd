"""The store of parsed input: one Parquet file per landing file, or per chunk of Kafka's raw records, under ADTALLY_HOME.

- The key of a landing file's entry is its name under the landing folder, its time of modification and its size.
- Raw records are parsed in chunks of a partition's offsets, whatever the batches. The key is the partition, the offsets and the
  table.
- Entries are derived data. The folder may be deleted at any time; a damaged entry, or one with another format, is made again.
- Several processes may write at once: an entry appears by rename, and two processes that make the same entry make it equal.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from spark_jobs.audit.suppressed import State, suppressed_state
from spark_jobs.audit.worker import FORMAT, METADATA_KEY, AnyTask, ChunkTask, ParseTask, is_in_state, parse_into
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, StoreError

Progress = Callable[[int, int], None]
_WORTH_PROCESSES = 48 * 1024 * 1024  # bytes from which processes are faster than one: each takes half a second to start
_GZIP_FACTOR = 8  # about the ratio of unpacked to stored bytes
_ABANDONED_SECONDS = 86_400.0


@dataclass(frozen=True)
class RawFile:
    """A landing file in one state: its absolute path or its URI, its time of modification in milliseconds and its size in bytes."""

    path: str
    mtime_ms: int
    size: int


@dataclass(frozen=True)
class RawChunk:
    """Offsets [start, end) of a Kafka partition (``name``: kafka/<cluster>/<topic>/<partition>), which the raw table has in full.

    ``paths`` returns the data files of table ``table_id`` that may have some of them. It is called only to parse them.
    """

    name: str
    start: int
    end: int
    table_id: str
    paths: Callable[[], list[str]] = field(compare=False, repr=False)


@dataclass(frozen=True)
class ParsedFile:
    """A landing file or a chunk of raw records, and the Parquet file of its records (``contract.record_schema``).

    ``name`` is the path under the landing folder, with ``/``, or the name of the partition; ``region`` is the folder's, or the name
    of the cluster. ``min_us`` and ``max_us`` bound the times of all records that have one, including rejected ones;
    ``has_unknown_time`` says that some have none.
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
    settings: Settings, stream: str, files: Sequence[RawFile | RawChunk], progress: Progress | None = None
) -> list[ParsedFile]:
    """Return the entries of files and chunks, in their order. Parses those that the store does not have.

    Leaves out a file that the store does not have if it is gone, or has changed since ``raw`` was taken. Calls
    ``progress(done, total)`` with the stored bytes. Raises AdtallyError where the records cannot be written.
    """
    suppressed = suppressed_state(settings)
    tasks = {raw: _task(settings, stream, raw, suppressed) for raw in files}
    found = {raw: entry for raw, task in tasks.items() if (entry := _read_entry(raw, task)) is not None}
    present = {raw: ready for raw, task in tasks.items() if raw not in found and (ready := _ready(raw, task)) is not None}
    _parse(list(present.values()), progress)
    found |= {raw: entry for raw, task in present.items() if (entry := _read_entry(raw, task, is_new=True)) is not None}
    _remove_shorter([task for task in present.values() if isinstance(task, ChunkTask)])
    return [found[raw] for raw in files if raw in found]


def _ready(raw: RawFile | RawChunk, task: AnyTask) -> AnyTask | None:
    """Return the task, ready to run; None if its landing file is gone or has changed."""
    if isinstance(task, ChunkTask) and isinstance(raw, RawChunk):
        return replace(task, paths=raw.paths())
    return task if isinstance(task, ParseTask) and is_in_state(task.path, task.mtime_ms, task.size) else None


def _remove_shorter(chunks: Sequence[ChunkTask]) -> None:
    """Remove the entries that new, longer chunks replace."""
    for task in chunks:
        target = Path(task.target)
        for path in target.parent.glob(f"{_stem(task.name, task.start, task.table_id)}-*.parquet"):
            end = path.stem.rpartition("-")[2]
            if end.isdecimal() and int(end) < task.end:
                path.unlink(missing_ok=True)


def _parse(tasks: Sequence[AnyTask], progress: Progress | None) -> None:
    """Write the entries of ``tasks``, in processes if that is faster."""
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
        except (OSError, StoreError, pa.ArrowException, duckdb.Error) as error:
            raise _failed(f"{type(error).__name__}: {error}") from error


def _failed(reason: str) -> AdtallyError:
    return AdtallyError(f"the raw input cannot be parsed for the recount: {reason}")


def _parse_in_processes(tasks: Sequence[AnyTask], workers: int, on_read: Callable[[int], None]) -> None:
    """Start with the largest files. Each process takes the next task when it finishes one."""
    waiting = iter(sorted(tasks, key=lambda task: -task.size))
    answers: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    processes = [_start() for _ in range(workers)]
    threads = ThreadPoolExecutor(workers)
    try:
        for process in processes:
            threads.submit(_feed, process, waiting, answers)
        busy = workers
        while busy:
            what, value = answers.get()
            if what == "read":
                on_read(value)
            elif what == "error":
                raise _failed(value)
            else:
                busy -= 1
    finally:
        for process in processes:
            process.kill()
        threads.shutdown()
        for process in processes:
            with suppress(OSError), process:  # leaving it waits for its end; input that it did not read is lost
                pass


def _start() -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    command = [sys.executable, "-m", "spark_jobs.audit.worker"]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment)


def _feed(process: subprocess.Popen[str], tasks: Iterator[AnyTask], answers: SimpleQueue[tuple[str, Any]]) -> None:
    """Send tasks to a process, one at a time, and pass on its answers, until no task is left or one fails.

    All threads share ``tasks``, the iterator of a list, whose next item only one of them gets.
    """
    assert process.stdin is not None and process.stdout is not None
    try:
        for task in tasks:
            print(json.dumps(asdict(task)), file=process.stdin, flush=True)
            for line in process.stdout:
                answer = json.loads(line)
                if "done" in answer:
                    break
                answers.put(next(iter(answer.items())))
                if "error" in answer:
                    return
            else:
                answers.put(("error", "a process that parses has ended too early"))
                return
    except (OSError, ValueError) as error:
        answers.put(("error", f"a process that parses has gone: {error}"))
    else:
        answers.put(("end", None))


def prune(settings: Settings, stream: str, keep: Collection[RawFile | RawChunk]) -> int:
    """Remove the entries of inputs that are not in ``keep``, and files that killed runs left. Returns the number of removed files.

    Nobody else may read or write the store of this stream meanwhile: callers hold the lock of corrections.
    """
    suppressed = suppressed_state(settings)
    wanted = {_task(settings, stream, raw, suppressed).target for raw in keep}
    removed = 0
    for path in _folder(settings, stream).glob("*"):
        is_abandoned = path.name.startswith(".") and time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
        if is_abandoned or (path.suffix == ".parquet" and not path.name.startswith(".") and str(path) not in wanted):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _folder(settings: Settings, stream: str) -> Path:
    return settings.recount_path / "parsed" / stream


def _task(settings: Settings, stream: str, raw: RawFile | RawChunk, suppressed: State) -> AnyTask:
    """Return the task that makes an entry. Entries made before somebody was erased have other names, and are made again."""
    digest = suppressed[-1]
    if isinstance(raw, RawChunk):
        table = f"{raw.table_id}.{digest}" if digest else raw.table_id
        target = _folder(settings, stream) / f"{_stem(raw.name, raw.start, table)}-{raw.end}.parquet"
        return ChunkTask(raw.name, raw.start, raw.end, table, [], stream, str(target), suppressed)
    name = raw.path.removeprefix(f"{settings.landing_uri}/")
    state = (name, str(raw.mtime_ms), str(raw.size), *filter(None, [digest]))
    target = _folder(settings, stream) / f"{_hash(*state)}.parquet"
    return ParseTask(raw.path, name, raw.mtime_ms, raw.size, stream, raw.path.split("/")[-2], str(target), suppressed)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:40]


def _stem(name: str, start: int, table_id: str) -> str:
    """Return the beginning of the name of a chunk's entry, whatever its end."""
    return f"{_hash(name, table_id)}-{start}"


def _read_entry(raw: RawFile | RawChunk, task: AnyTask, *, is_new: bool = False) -> ParsedFile | None:
    """Read a usable entry; None if there is none. The entry of a file that could not be read is usable only while it is new."""
    try:
        metadata = pq.read_metadata(task.target)
        entry: dict[str, Any] = json.loads((metadata.metadata or {})[METADATA_KEY])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None
    key = (entry.get("format"), entry.get("name"), entry.get("state"), entry.get("records"))
    if key != (FORMAT, task.name, task.state, metadata.num_rows) or (entry["is_unreadable"] and not is_new):
        return None
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
