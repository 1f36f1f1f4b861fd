"""Runs dbt as a process of its own and says in one line what failed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
from duckdb_extensions import import_extension

from spark_jobs.errors import AdtallyError, MachineError
from spark_jobs.failure import one_line
from spark_jobs.lake.duck import connect_delta

_NAMES_SHOWN = 5
_PROJECT_FILE = "dbt_project.yml"

# `-m dbt.cli.main` would import that module twice and warn about it.
_DBT = "from dbt.cli.main import cli; cli(prog_name='dbt')"


def project_dir() -> Path:
    """Folder of the dbt project: bundled with the package, or beside it in a checkout.

    Raises MachineError when neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "dbt_project", package.parent / "dbt_project"):
        if (candidate / _PROJECT_FILE).is_file():
            return candidate
    raise MachineError("the dbt project is not installed", hint="reinstall adtally")


def git_revision(folder: Path) -> str | None:
    """Commit of the checkout that tracks the project in ``folder``, ``-dirty`` when changed; None when unknown."""
    # An installed package may lie inside somebody else's repository: only one that tracks the project counts.
    for arguments in (
        ["ls-files", "--error-unmatch", _PROJECT_FILE],
        ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
    ):
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None
    return done.stdout.strip() or None


def project_version(project: Path) -> str:
    """Version of the dbt project in ``project``, as its dbt_project.yml says."""
    import yaml  # type: ignore[import-untyped]  # here, since the command line imports this module

    loaded: dict[str, Any] = yaml.safe_load((project / _PROJECT_FILE).read_text("utf-8"))
    return str(loaded["version"])


def project_hash(project: Path) -> str:
    """Hash of all that decides what the marts contain: models, macros and dbt_project.yml, without tests and descriptions."""
    files = [project / _PROJECT_FILE, *(path for folder in ("models", "macros") for path in (project / folder).rglob("*.sql"))]
    found = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        found.update(f"{path.relative_to(project).as_posix()}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()[:32]


def install_delta_extension() -> None:
    """Install DuckDB's ``delta`` extension for this user, from the package and without a network: dbt loads it by its name.

    Raises MachineError if the package is missing or does not fit this DuckDB, or if the user's folder cannot be written.
    """
    with connect_delta() as connection:
        try:
            import_extension("delta", con=connection)
        except (ImportError, RuntimeError, duckdb.Error) as error:
            raise MachineError(f"DuckDB's delta extension cannot be installed: {one_line(error)}") from error


@dataclass(frozen=True)
class DbtNode:
    """What became of a model or a test. ``failures``: rows that a test found; ``compiled``: its SQL, empty when not known."""

    unique_id: str
    status: str
    seconds: float
    failures: int
    message: str
    compiled: str

    @property
    def passed(self) -> bool:
        """Built, or tested without an error. A test that only warns has passed."""
        return self.status in ("success", "pass", "warn")

    @property
    def failed(self) -> bool:
        """Failed by itself; what was skipped because of it has not."""
        return self.status in ("error", "fail", "runtime error")

    @property
    def label(self) -> str:
        """Its kind, its name and why it failed."""
        # test.adtally.<name>.<hash> · model.adtally.<name> · unit_test.adtally.<model>.<name>
        kind, _, *rest = self.unique_id.split(".")
        name = rest[-1] if kind == "unit_test" else rest[0]
        if kind == "test" and self.status == "fail":
            return f"test {name} ({self.failures} row{'' if self.failures == 1 else 's'})"
        if kind == "unit_test" and self.status == "fail":
            return f"unit test {name}"
        return f"{kind.replace('_', ' ')} {name}: {one_line(self.message, 160)}"


class DbtError(AdtallyError):
    """A run of dbt failed. ``nodes`` are those that ran, with what became of each."""

    def __init__(self, message: str, *, nodes: Sequence[DbtNode] = (), hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.nodes = list(nodes)


@dataclass(frozen=True)
class DbtFolders:
    """Where dbt writes: nothing goes into the project, which may be read-only and serves several homes."""

    target: Path
    logs: Path


def run_dbt(
    command: str,
    *,
    project: Path,
    folders: DbtFolders,
    variables: Mapping[str, object],
    environment: Mapping[str, str],
    selection: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> list[DbtNode]:
    """Runs ``dbt <command>`` with ``selection`` as its further arguments; the nodes (models and tests) that ran.

    ``progress`` gets dbt's lines as they come. Warnings of tests do not fail a run, errors and failures do.
    Raises DbtError with the names of what failed. The process is ended when the caller is interrupted.
    """
    results = folders.target / "run_results.json"
    results.unlink(missing_ok=True)
    if importlib.util.find_spec("dbt") is None:
        raise MachineError("dbt is not installed", hint="reinstall adtally")
    arguments = [
        *(sys.executable, "-c", _DBT, "--no-partial-parse", "--no-use-colors", "--log-format", "json"),
        *(command, *selection, "--project-dir", str(project), "--profiles-dir", str(project)),
        *("--target-path", str(folders.target), "--log-path", str(folders.logs)),
        *("--vars", json.dumps(variables)),
    ]
    own = {
        "DBT_SEND_ANONYMOUS_USAGE_STATS": "false",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    # Flags and selections that a user set for dbt projects of their own are not meant for this one.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("DBT_")}
    last_errors: list[str] = []
    process = subprocess.Popen(
        arguments,
        cwd=folders.target,
        env={**inherited, **own, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            level, message = _log_line(line)
            if level == "error" or (level == "raw" and message):
                last_errors = [*last_errors[-9:], message]
            if progress is not None and message and level != "debug":
                progress(message)
        status = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()
    nodes = _read_results(results)
    failures = [node.label for node in nodes if node.failed]
    if failures:
        shown = ", ".join(failures[:_NAMES_SHOWN])
        more = f" and {len(failures) - _NAMES_SHOWN} more" if len(failures) > _NAMES_SHOWN else ""
        raise DbtError(f"dbt {command} failed: {shown}{more}", nodes=nodes, hint=f"details in {results}")
    if status != 0:
        reason = one_line(" ".join(last_errors)) or f"dbt ended with status {status}"
        raise DbtError(f"dbt {command} failed: {reason}", nodes=nodes, hint=f"log in {folders.logs}")
    return nodes


def _log_line(line: str) -> tuple[str, str]:
    """Level and message of a line of dbt's JSON log; level ``raw`` when it is none, as a traceback is."""
    try:
        info = json.loads(line)["info"]
        return str(info["level"]), one_line(str(info["msg"]))
    except (ValueError, KeyError, TypeError):
        return "raw", one_line(line)


def _read_results(path: Path) -> list[DbtNode]:
    """What became of each node that dbt came to; nothing where it came to none."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError):
        return []
    return [
        DbtNode(
            unique_id=str(result["unique_id"]),
            status=str(result["status"]),
            seconds=float(result.get("execution_time") or 0),
            failures=int(result.get("failures") or 0),
            message=str(result.get("message") or ""),
            compiled=str(result.get("compiled_code") or ""),
        )
        for result in results
    ]
