"""Runs dbt as a process of its own and says in one line what failed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from spark_jobs.duck import connect_delta
from spark_jobs.errors import AdtallyError, MachineError

_NAMES_SHOWN = 5

# `-m dbt.cli.main` would import that module twice and warn about it.
_DBT = "from dbt.cli.main import cli; cli(prog_name='dbt')"


def project_dir() -> Path:
    """Folder of the dbt project: bundled with the package, or beside it in a checkout.

    Raises MachineError when neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "dbt_project", package.parent / "dbt_project"):
        if (candidate / "dbt_project.yml").is_file():
            return candidate
    raise MachineError("the dbt project is not installed", hint="reinstall adtally")


def git_revision(folder: Path) -> str | None:
    """Commit of the checkout that tracks the project in ``folder``, ``-dirty`` when changed; None when unknown."""
    # An installed package may lie inside somebody else's repository: only one that tracks the project counts.
    for arguments in (
        ["ls-files", "--error-unmatch", "dbt_project.yml"],
        ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
    ):
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None
    return done.stdout.strip() or None


def install_delta_extension() -> None:
    """Makes DuckDB's ``delta`` extension loadable, from the installed package, without a network.

    Raises MachineError when the package is missing or does not fit this DuckDB.
    """
    connect_delta().close()


def one_line(text: str, limit: int = 300) -> str:
    """``text`` with its white space collapsed, cut to ``limit`` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


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
    progress: Callable[[str], None] | None = None,
) -> int:
    """Runs ``dbt <command>``; the number of nodes (models and tests) that passed.

    ``progress`` gets dbt's lines as they come. Warnings of tests do not fail a run, errors and failures do.
    Raises AdtallyError with the names of what failed. The process is ended when the caller is interrupted.
    """
    results = folders.target / "run_results.json"
    results.unlink(missing_ok=True)
    if importlib.util.find_spec("dbt") is None:
        raise MachineError("dbt is not installed", hint="reinstall adtally")
    arguments = [
        *(sys.executable, "-c", _DBT, "--no-partial-parse", "--no-use-colors", "--log-format", "json"),
        *(command, "--project-dir", str(project), "--profiles-dir", str(project)),
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
    passed, failures = _read_results(results)
    if failures:
        shown = ", ".join(failures[:_NAMES_SHOWN])
        more = f" and {len(failures) - _NAMES_SHOWN} more" if len(failures) > _NAMES_SHOWN else ""
        raise AdtallyError(f"dbt {command} failed: {shown}{more}", hint=f"details in {results}")
    if status != 0:
        reason = one_line(" ".join(last_errors)) or f"dbt ended with status {status}"
        raise AdtallyError(f"dbt {command} failed: {reason}", hint=f"log in {folders.logs}")
    return passed


def _log_line(line: str) -> tuple[str, str]:
    """Level and message of a line of dbt's JSON log; level ``raw`` when it is none, as a traceback is."""
    try:
        info = json.loads(line)["info"]
        return str(info["level"]), one_line(str(info["msg"]))
    except (ValueError, KeyError, TypeError):
        return "raw", one_line(line)


def _read_results(path: Path) -> tuple[int, list[str]]:
    """Number of nodes that passed, and a description of each that did not; skipped ones are left out."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError):
        return 0, []
    passed = sum(result["status"] in ("success", "pass", "warn") for result in results)
    failures = []
    for result in results:
        if result["status"] not in ("error", "fail", "runtime error"):
            continue
        # test.adtally.<name>.<hash> · model.adtally.<name> · unit_test.adtally.<model>.<name>
        kind, _, *rest = str(result["unique_id"]).split(".")
        name = rest[-1] if kind == "unit_test" else rest[0]
        if kind == "test" and result["status"] == "fail":
            rows = result.get("failures") or 0
            failures.append(f"test {name} ({rows} row{'' if rows == 1 else 's'})")
        elif kind == "unit_test" and result["status"] == "fail":
            failures.append(f"unit test {name}")
        else:
            failures.append(f"{kind.replace('_', ' ')} {name}: {one_line(str(result.get('message') or ''), 160)}")
    return passed, failures
