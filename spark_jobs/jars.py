"""Resolves jars that a lock file pins into a cache folder, among them Delta Lake and the Kafka connector for Spark.

A lock names each jar with its size and its SHA-256. `ensure_cached` checks every jar on every call and resolves missing ones. Later
starts read the cache alone and use no network. services/launcher uses the same functions for Kafka and Pinot.

Spark's Ivy resolves Spark's jars by ``jars.lock.json`` of this folder. The lock leaves out jars that Spark ships, so that no class
is on the class path twice.

    python -m spark_jobs.jars             resolve what is missing, print the paths
    python -m spark_jobs.jars --update    resolve anew and rewrite jars.lock.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import AdtallyError, BusyError, MachineError
from spark_jobs.java import require_java

COORDINATES = ("io.delta:delta-spark_4.2_2.13:4.4.0", "org.apache.spark:spark-sql-kafka-0-10_2.13:4.2.0")
LOCK_FILE = Path(__file__).with_name("jars.lock.json")
RESOLVE_TIMEOUT_SECONDS = 900

Progress = Callable[[str], None]
Lock = TypeVar("Lock")

# Spark resolves `spark.jars.packages` while its session starts: this program starts one and ends it.
_RESOLVE = """
import sys
from pyspark.sql import SparkSession
packages, excludes, ivy, warehouse = sys.argv[1:5]
builder = (SparkSession.builder.master("local[1]").appName("adtally-jars")
    .config("spark.ui.enabled", "false").config("spark.sql.warehouse.dir", warehouse)
    .config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1")
    .config("spark.jars.packages", packages).config("spark.jars.ivy", ivy))
if excludes:
    builder = builder.config("spark.jars.excludes", excludes)
builder.getOrCreate().stop()
"""


@dataclass(frozen=True)
class LockedJar:
    """A jar of a lock: its file name in the cache, its size in bytes and its SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class JarLock:
    """The content of ``jars.lock.json``.

    ``jars`` go on the class path. ``excluded`` maps ``group:artifact`` of each other resolved jar to the jar of Spark that has its
    classes.
    """

    spark_version: str
    coordinates: tuple[str, ...]
    jars: tuple[LockedJar, ...]
    excluded: dict[str, str]

    @property
    def digest(self) -> str:
        """The name of the cache folder, different for each lock."""
        text = json.dumps([self.coordinates, [asdict(jar) for jar in self.jars]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(maxsize=4)
def read_lock(path: Path = LOCK_FILE) -> JarLock:
    """Read the lock of Spark's jars. Raises MachineError if it is missing, broken, or made for another Spark."""
    lock = parse_lock(
        path,
        lambda data: JarLock(
            spark_version=data["spark_version"],
            coordinates=tuple(data["coordinates"]),
            jars=tuple(LockedJar(**jar) for jar in data["jars"]),
            excluded=dict(data["excluded"]),
        ),
    )
    installed = version("pyspark")
    if lock.spark_version != installed:
        raise MachineError(
            f"{path.name} was made for Spark {lock.spark_version}, but pyspark {installed} is installed",
            hint="run `uv sync --frozen`, or `python -m spark_jobs.jars --update` after an upgrade",
        )
    return lock


def ensure_jars(settings: Settings, progress: Progress | None = None, *, lock: JarLock | None = None) -> list[Path]:
    """Return the paths of the jars for ``spark.jars``; resolve them first if the cache lacks some. Raises as `ensure_cached`."""
    pinned = lock or read_lock()
    return ensure_cached(
        settings.jar_cache_path / pinned.digest,
        pinned.jars,
        lambda work: _resolve(pinned.coordinates, tuple(pinned.excluded), work),
        description=f"{len(pinned.jars)} jars, {megabytes(pinned.jars)} MB, once (about half a minute)",
        update="python -m spark_jobs.jars --update",
        progress=progress or (lambda _line: None),
    )


def jars_are_cached(settings: Settings, lock: JarLock | None = None) -> bool:
    """Return whether every jar is in the cache, so that nothing would be resolved."""
    lock = lock or read_lock()
    return _is_complete(settings.jar_cache_path / lock.digest, lock.jars)


def parse_lock(path: Path, parse: Callable[[dict[str, Any]], Lock]) -> Lock:
    """Return what ``parse`` makes of a lock file. Raises MachineError if the file is missing or broken."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MachineError(f"{path} cannot be read: {error}", hint="restore it from the repository") from None


def ensure_cached(
    folder: Path,
    jars: Sequence[LockedJar],
    resolve: Callable[[Path], Iterable[Path]],
    *,
    description: str,
    update: str,
    progress: Progress,
) -> list[Path]:
    """Return the paths of ``jars`` in ``folder``, in their order; resolve all of them first if some are missing.

    ``resolve`` gets an empty working folder and returns files that have the names of the jars, and maybe others. ``description``
    says what is resolved; ``update`` is the command that rewrites the lock. ``progress`` receives a line before and after.

    Every call checks all jars: it resolves truncated files again and never loads a changed one. Several processes may call it at
    once: one resolves, the others wait.

    Raises MachineError if a jar differs from the lock or cannot be resolved, BusyError if another process takes longer than
    RESOLVE_TIMEOUT_SECONDS.
    """
    if not _is_complete(folder, jars):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f"{folder.name}.lock", timeout=RESOLVE_TIMEOUT_SECONDS):
                if not _is_complete(folder, jars):
                    progress(f"resolving {description} into {folder}")
                    _fill(folder, jars, resolve, update)
                    progress(f"resolved and checked {len(jars)} jars")
        except Timeout:
            raise BusyError(f"another process has been resolving the jars in {folder.parent} for too long") from None
        except OSError as error:
            raise MachineError(f"the jar cache {folder.parent} cannot be written: {error}", hint="set ADTALLY_CACHE_DIR") from None
    for jar in jars:
        _check(folder / jar.name, jar, hint=f"delete {folder} and run again")
    return [folder / jar.name for jar in jars]


def megabytes(jars: Sequence[LockedJar]) -> str:
    """Return the size of all jars in whole megabytes."""
    return f"{sum(jar.size for jar in jars) / 1e6:.0f}"


def _is_complete(folder: Path, jars: Sequence[LockedJar]) -> bool:
    """Return whether every jar exists with its size: a crash of the machine may leave truncated files."""
    return all((path := folder / jar.name).is_file() and path.stat().st_size == jar.size for jar in jars)


def _check(path: Path, jar: LockedJar, *, hint: str) -> None:
    size = path.stat().st_size
    if size != jar.size:
        raise MachineError(f"{path} has {size} bytes, {LOCK_FILE.name} says {jar.size}; no jar was used", hint=hint)
    found = sha256_of(path)
    if found != jar.sha256:
        raise MachineError(f"{path} has SHA-256 {found}, {LOCK_FILE.name} says {jar.sha256}; no jar was used", hint=hint)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fill(folder: Path, jars: Sequence[LockedJar], resolve: Callable[[Path], Iterable[Path]], update: str) -> None:
    prefix = f"resolve-{folder.name}-"
    for left in folder.parent.glob(f"{prefix}*"):  # from a killed process: nobody uses it, because this process has the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as work:
        resolved = {path.name: path for path in resolve(Path(work))}
        staged = Path(work) / "jars-checked"
        staged.mkdir()
        for jar in jars:
            if jar.name not in resolved:
                raise MachineError(
                    f"{jar.name} of {LOCK_FILE.name} was not among the {len(resolved)} jars resolved",
                    hint=f"`{update}` rewrites the lock after an upgrade",
                )
            _check(resolved[jar.name], jar, hint="the repository that answered does not hold the jar this project pins")
            shutil.move(resolved[jar.name], staged / jar.name)
        if folder.exists():  # incomplete
            shutil.rmtree(folder)
        staged.rename(folder)


def run_resolver(command: Sequence[str], work: Path, environment: dict[str, str] | None = None) -> None:
    """Run the program that downloads jars, in the folder ``work``. Raises MachineError with one line of its output if it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=RESOLVE_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        problem = f"the jars could not be resolved within {RESOLVE_TIMEOUT_SECONDS} seconds"
        raise MachineError(problem, hint="check the network and run again") from None
    except OSError as error:
        raise MachineError(f"the jars could not be resolved: {error}") from None
    if done.returncode != 0:
        raise MachineError(
            f"the jars could not be resolved: {_reason(done.stdout + done.stderr)}",
            hint="check that Maven Central can be reached and run again; later starts need no network",
        )


def _reason(output: str) -> str:
    lines = output.strip().splitlines()
    for sign in ("unresolved dependency", "not found", "UNRESOLVED", "download failed", "[FAILED", "FAILED DOWNLOADS", "Exception"):
        for line in lines:
            if sign in line and "WARN" not in line:
                return line.strip(" :\t")
    return lines[-1].strip() if lines else "the resolver said nothing"


def jars_of_spark() -> list[Path]:
    """Return the jars that pyspark ships. Raises MachineError if pyspark is not installed."""
    spec = find_spec("pyspark")
    if spec is None or spec.origin is None:
        raise MachineError("pyspark is not installed", hint="run `uv sync --frozen`")
    return sorted((Path(spec.origin).parent / "jars").glob("*.jar"))


def _resolve(coordinates: tuple[str, ...], excludes: tuple[str, ...], work: Path) -> list[Path]:
    require_java()
    ivy = work / "ivy"
    ivy.mkdir(parents=True)
    # with the SPARK_HOME of another Spark, Ivy would resolve for that one
    environment = {name: value for name, value in os.environ.items() if name not in ("SPARK_HOME", "PYSPARK_SUBMIT_ARGS")}
    arguments = [",".join(coordinates), ",".join(excludes), str(ivy), str(work / "warehouse")]
    run_resolver([sys.executable, "-c", _RESOLVE, *arguments], work, environment)
    return sorted((ivy / "jars").glob("*.jar"))


def update_lock(path: Path = LOCK_FILE, progress: Progress = print) -> JarLock:
    """Resolve COORDINATES with all that they need, and write the lock.

    Leaves out a resolved jar if most of its classes are in a jar that pyspark ships.
    """
    shipped = _classes_of_spark()
    with tempfile.TemporaryDirectory(prefix="adtally-jars-") as work:
        progress("resolving " + ", ".join(COORDINATES))
        everything = _resolve(COORDINATES, (), Path(work))
        owners = {_group_and_artifact(jar.name): owner for jar in everything if (owner := _owner(jar, shipped))}
        # resolved again without those, so that jars which only they need are left out too
        wanted = _resolve(COORDINATES, tuple(sorted(owners)), Path(work) / "again")
        jars = tuple(LockedJar(jar.name, jar.stat().st_size, sha256_of(jar)) for jar in wanted)
    lock = JarLock(version("pyspark"), COORDINATES, jars, dict(sorted(owners.items())))
    path.write_text(json.dumps(asdict(lock), indent=2) + "\n", encoding="utf-8")
    progress(f"{path}: {len(jars)} jars pinned, {len(owners)} left to Spark")
    return lock


def _classes(jar: Path) -> list[str]:
    with zipfile.ZipFile(jar) as archive:
        names = [name for name in archive.namelist() if name.endswith(".class") and not name.startswith("META-INF/")]
    return [name for name in names if not name.endswith("module-info.class")]


def _classes_of_spark() -> dict[str, str]:
    return {name: jar.name for jar in jars_of_spark() for name in _classes(jar)}


def _owner(jar: Path, shipped: dict[str, str]) -> str | None:
    names = _classes(jar)
    owners = [shipped[name] for name in names if name in shipped]
    return max(set(owners), key=owners.count) if len(owners) * 2 > len(names) else None


def _group_and_artifact(file_name: str) -> str:
    """Return ``org.apache.kafka:kafka-clients`` for ``org.apache.kafka_kafka-clients-3.9.2.jar``."""
    return file_name.removesuffix(".jar").rsplit("-", 1)[0].replace("_", ":", 1)


def main(arguments: list[str] | None = None) -> int:
    """Run ``python -m spark_jobs.jars`` and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m spark_jobs.jars", description="The jars that Spark needs.")
    parser.add_argument("--update", action="store_true", help="resolve anew and rewrite jars.lock.json")
    options = parser.parse_args(arguments)
    try:
        if options.update:
            update_lock()
        for path in ensure_jars(load_settings(), progress=lambda line: print(line, file=sys.stderr)):
            print(path)
    except AdtallyError as error:
        print(f"adtally: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
