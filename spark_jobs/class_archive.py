"""Keeps an archive of the classes that an ingest loads. Java maps it at a start, instead of the jars.

With it, Java needs about half the CPU time until the first batch. It is derived from Java, this environment and the jars; Java
ignores an archive that does not fit them. `make setup` makes it, as it compiles the Python code. Without it an ingest works.

    python -m spark_jobs.class_archive     make the archive if it is missing
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from spark_jobs import disk
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import AdtallyError, MachineError
from spark_jobs.failure import one_line
from spark_jobs.jars import ensure_jars, jars_of_spark, read_lock
from spark_jobs.java import require_java

_ENDING = ".jsa"
_SECONDS = 600

# Ingests a record of each stream, then waits until Java has written the archive, which it does when it ends.
_INGEST = """
from pyspark import SparkContext
from spark_jobs.config import load_settings
from spark_jobs.ingest.runner import run_ingest
assert run_ingest(load_settings()).batches == 2
java = SparkContext._gateway.proc
java.stdin.close()
java.wait()
"""


def class_archive(settings: Settings) -> Path | None:
    """Return the archive for this Java, this environment and these jars; None if it has not been made."""
    path = _archive_path(settings)
    return path if path.exists() else None


def make_class_archive(settings: Settings, progress: Callable[[str], None] = lambda _line: None) -> Path:
    """Return the archive; make it first if it is missing. Removes the archives of this environment's earlier jars.

    ``progress`` receives a line before. Raises MachineError if the archive cannot be made.
    """
    ensure_jars(settings, progress=progress)
    path = _archive_path(settings)
    if path.exists():
        return path
    with FileLock(path.with_name(f"{_environment_name()}.lock")):
        if path.exists():
            return path
        progress(f"archiving the classes that an ingest loads in {path} (about half a minute, once)")
        with tempfile.TemporaryDirectory(prefix="classes-", dir=path.parent) as folder:
            made = Path(folder) / path.name
            _ingest(settings, Path(folder), made)
            for old in path.parent.glob(f"{_environment_name()}-*{_ENDING}"):
                old.unlink()
            disk.replace(made, path)
    return path


def _ingest(settings: Settings, folder: Path, archive: Path) -> None:
    """Run an ingest in ``folder``, whose Java writes ``archive`` at its end."""
    for stream, record in _RECORDS.items():
        landed = folder / "home" / "landing" / stream / "eu" / "1.jsonl"
        landed.parent.mkdir(parents=True)
        landed.write_text(json.dumps(record), "utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ADTALLY_")}
    environment |= {
        "ADTALLY_HOME": str(folder / "home"),
        "ADTALLY_CACHE_DIR": str(settings.jar_cache_path.parent),
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "SPARK_SUBMIT_OPTS": f"-XX:ArchiveClassesAtExit={archive}",
    }
    command = [sys.executable, "-c", _INGEST]
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"the classes cannot be archived: {error}") from None
    if done.returncode != 0 or not archive.exists():
        raise MachineError(f"the classes cannot be archived: {one_line(done.stderr[-400:])}")


_RECORDS = {
    "events": {
        "event_id": "e",
        "event_type": "click",
        "event_time": "2025-01-01T00:00:00Z",
        "campaign_id": "c",
        "ad_id": "a",
        "store_id": "s",
        "user_id": "u",
        "currency": "EUR",
    },
    "orders": {
        "order_id": "o",
        "order_time": "2025-01-01T00:00:00Z",
        "user_id": "u",
        "store_id": "s",
        "total_micros": 1,
        "currency": "EUR",
        "status": "placed",
    },
}


def _environment_name() -> str:
    return f"classes-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]}"


def _archive_path(settings: Settings) -> Path:
    """Return the archive's place, whose name has a hash of all that Java compares at a start."""
    java = require_java().executable.resolve()
    folder = settings.jar_cache_path
    jars = [java, *jars_of_spark(), *sorted((folder / read_lock().digest).glob("*.jar"))]
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in jars]
    return folder / f"{_environment_name()}-{hashlib.sha256(repr(states).encode()).hexdigest()[:16]}{_ENDING}"


if __name__ == "__main__":
    try:
        print(make_class_archive(load_settings(), progress=lambda line: print(line, file=sys.stderr, flush=True)))
    except AdtallyError as error:
        print(f"adtally: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
