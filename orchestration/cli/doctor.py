"""What the machine must have, each looked at by itself so that one fault does not hide the next."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import AdtallyError, MachineError

MIN_FREE_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Check:
    """One finding; ``detail`` says what was found, or what is wrong and what to do."""

    name: str
    ok: bool
    detail: str


def examine(home: Path | None, *, fix: bool = False) -> list[Check]:
    """All checks in a fixed order. With ``fix`` the jars are resolved if they are not there yet."""
    try:
        settings = load_settings(home=home)
    except AdtallyError as error:
        return [Check("settings", False, str(error)), _check("java", _java)]
    return [
        Check("settings", True, f"home {settings.home_path}, tables in {settings.lakehouse_uri}"),
        Check("python", True, sys.version.split()[0]),
        _check("java", _java),
        _check("jars", lambda: _jars(settings, fix)),
        _check("duckdb extension", _extension),
        _check("home", lambda: _writable(settings.home_path)),
        _check("landing", lambda: _landing(settings)),
        _check("disk", lambda: _disk(settings.home_path)),
    ]


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (AdtallyError, OSError) as error:
        return Check(name, False, str(error))


def _java() -> str:
    from spark_jobs.java import require_java

    java = require_java()
    return f"Java {java.major} at {java.executable}"


def _jars(settings: Settings, fix: bool) -> str:
    from spark_jobs.jars import ensure_jars, jars_are_cached

    if not fix and not jars_are_cached(settings):
        raise MachineError("not resolved yet", hint="`adtally doctor --fix` does it; so does the first ingest")
    jars = ensure_jars(settings, progress=lambda line: print(line, file=sys.stderr, flush=True))
    return f"{len(jars)} as pinned, in {jars[0].parent}"


def _extension() -> str:
    import duckdb

    from orchestration.marts.dbt_runner import install_delta_extension

    install_delta_extension()
    return f"delta for DuckDB {duckdb.__version__}"


def _writable(home: Path) -> str:
    place = nearest(home)
    if not place.is_dir():
        raise MachineError(f"{place} is not a folder", hint="set ADTALLY_HOME to another place")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise MachineError(f"{place} cannot be written: {error.strerror}", hint="set ADTALLY_HOME to another place") from None
    return f"{home} can be written" if home.exists() else f"{home} will be made"


def _landing(settings: Settings) -> str:
    folder = settings.landing_path
    if not folder.exists():
        return f"{folder} is not there yet: nothing to ingest"
    if not os.access(folder, os.R_OK | os.X_OK):
        raise MachineError(f"{folder} cannot be read", hint="give this user the right to read it")
    return str(folder)


def _disk(home: Path) -> str:
    free = shutil.disk_usage(nearest(home)).free
    if free < MIN_FREE_BYTES:
        raise MachineError(f"{free / 1e9:.1f} GB free", hint=f"at least {MIN_FREE_BYTES / 1e9:.1f} GB are wanted")
    return f"{free / 1e9:.1f} GB free"


def nearest(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())
