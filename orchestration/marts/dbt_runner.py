"""Runs dbt in a process and reads what failed: the nodes, and the rows that failed tests found."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
from duckdb_extensions import import_extension

from spark_jobs.errors import AdtallyError, MachineError
from spark_jobs.failure import one_line
from spark_jobs.lake.duck import connect_delta, literal
from spark_jobs.texts import counted

ROWS_KEPT = 20

_NAMES_SHOWN = 5
_DBT = "from dbt.cli.main import cli; cli(prog_name='dbt')"  # `-m dbt.cli.main` would import that module twice and warn about it

Rows = dict[str, list[dict[str, object]]]
"""Test (dbt's unique id) -> the first rows that it found."""


def project_version(project: Path) -> str:
    """Version of the dbt project in ``project``, as its dbt_project.yml says."""
    import yaml  # type: ignore[import-untyped]  # here, since the command line imports this module

    loaded: dict[str, Any] = yaml.safe_load((project / "dbt_project.yml").read_text("utf-8"))
    return str(loaded["version"])


def project_hash(project: Path) -> str:
    """Hash of all that decides what the marts contain: models, macros and dbt_project.yml, without tests and descriptions."""
    files = [project / "dbt_project.yml", *(path for folder in ("models", "macros") for path in (project / folder).rglob("*.sql"))]
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
    """The result of a model or a test. ``failures``: rows that a test found; ``compiled``: its SQL, empty if unknown."""

    unique_id: str
    status: str
    seconds: float
    failures: int
    message: str
    compiled: str

    @property
    def passed(self) -> bool:
        """Whether it was built, or tested without an error. A test that only warns has passed."""
        return self.status in ("success", "pass", "warn")

    @property
    def failed(self) -> bool:
        """Whether it failed itself, and was not skipped because of another one."""
        return self.status in ("error", "fail", "runtime error")

    @property
    def label(self) -> str:
        """Its kind, its name and why it failed."""
        # test.adtally.<name>.<hash> · model.adtally.<name> · unit_test.adtally.<model>.<name>
        kind, _, *rest = self.unique_id.split(".")
        name = rest[-1] if kind == "unit_test" else rest[0]
        if kind == "test" and self.status == "fail":
            return f"test {name} ({counted(self.failures, 'row')})"
        if kind == "unit_test" and self.status == "fail":
            return f"unit test {name}"
        return f"{kind.replace('_', ' ')} {name}: {one_line(self.message, 160)}"


class MartsError(AdtallyError):
    """A build of the marts failed; what was published stays. ``nodes``: the results; ``rows``: what failed tests found."""

    def __init__(self, message: str, hint: str, nodes: list[DbtNode], rows: Rows) -> None:
        super().__init__(message, hint=hint)
        self.nodes, self.rows = nodes, rows


def project_dir() -> Path:
    """Return the folder of the dbt project: bundled with the package, or beside it in a checkout. Raises MachineError."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "dbt_project", package.parent / "dbt_project"):
        if (candidate / "dbt_project.yml").is_file():
            return candidate
    raise MachineError("the dbt project is not installed", hint="reinstall adtally")


def git_revision(folder: Path) -> str | None:
    """Return the commit of the checkout that tracks the project in ``folder``, ``-dirty`` if changed; None if unknown."""
    git = ("git", "-C", str(folder))
    try:
        # An installed package may be inside somebody else's repository: only one that tracks the project counts.
        subprocess.run([*git, "ls-files", "--error-unmatch", "dbt_project.yml"], capture_output=True, timeout=20, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, timeout=20, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def run_dbt_build(
    folder: Path,
    marts: Path,
    *,
    selection: Sequence[str],
    variables: Mapping[str, object],
    progress: Callable[[str], None] | None = None,
) -> list[DbtNode]:
    """Build and test the selected models in the DuckDB file ``marts``; return the models and tests that ran.

    dbt writes its own files into ``folder``: the project may be read-only and serves several homes. ``progress`` gets dbt's lines
    as they come. Raises MartsError with what failed; a test that warns has not. Ends the process if the caller is interrupted.
    """
    work = marts.with_name("work.duckdb")
    target, logs = folder / "target", folder / "logs"
    for made in (target, logs):
        made.mkdir(parents=True, exist_ok=True)
    results, kept = target / "run_results.json", folder / "failed_rows.json"
    for earlier in (results, kept):
        earlier.unlink(missing_ok=True)
    project = str(project_dir())
    flags = ["--no-partial-parse", "--no-use-colors", "--log-format", "json"]
    paths = ["--project-dir", project, "--profiles-dir", project, "--target-path", str(target), "--log-path", str(logs)]
    # Flags and selections that a user set for dbt projects of their own are not meant for this one.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("DBT_")}
    own = {
        "DBT_SEND_ANONYMOUS_USAGE_STATS": "false",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "ADTALLY_DBT_MARTS_PATH": str(marts),
        "ADTALLY_DBT_WORK_PATH": str(work),
    }
    last_errors: deque[str] = deque(maxlen=10)
    with subprocess.Popen(
        [sys.executable, "-c", _DBT, *flags, "build", *selection, *paths, "--vars", json.dumps(variables)],
        cwd=target,
        env=inherited | own,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                level, message = _log_line(line)
                if level in ("error", "raw") and message:
                    last_errors.append(message)
                if progress is not None and message and level != "debug":
                    progress(message)
        except BaseException:
            process.kill()
            raise
    nodes = _read_results(results)
    failures = [node.label for node in nodes if node.failed]
    if failures:
        more = f" and {len(failures) - _NAMES_SHOWN} more" if len(failures) > _NAMES_SHOWN else ""
        rows = _failing_rows(nodes, marts, work)
        hint = f"details in {results}"
        if rows:
            kept.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", "utf-8")
            hint = f"rows in {kept}: {_first_row(rows)}"
        raise MartsError(f"dbt build failed: {', '.join(failures[:_NAMES_SHOWN])}{more}", hint, nodes, rows)
    if process.returncode != 0:
        reason = one_line(" ".join(last_errors)) or f"dbt ended with status {process.returncode}"
        raise MartsError(f"dbt build failed: {reason}", f"log in {logs}", nodes, {})
    return nodes


def _log_line(line: str) -> tuple[str, str]:
    """Return level and message of a line of dbt's JSON log; level ``raw`` for other lines, such as a traceback."""
    try:
        info = json.loads(line)["info"]
        return str(info["level"]), one_line(info["msg"])
    except (ValueError, KeyError, TypeError):
        return "raw", one_line(line)


def _read_results(path: Path) -> list[DbtNode]:
    """Return the nodes that ran; none if dbt failed before the first."""
    if not path.exists():
        return []
    return [
        DbtNode(
            unique_id=result["unique_id"],
            status=result["status"],
            seconds=float(result["execution_time"] or 0),
            failures=int(result["failures"] or 0),
            message=str(result["message"] or ""),
            compiled=str(result["compiled_code"] or ""),
        )
        for result in json.loads(path.read_text("utf-8"))["results"]
    ]


def _failing_rows(nodes: Iterable[DbtNode], marts: Path, work: Path) -> Rows:
    """Return the first rows that each failed test found in the build, as JSON can hold them.

    Leaves out a test whose SQL cannot run again: a model that it reads was not built.
    """
    failed = [node for node in nodes if node.status == "fail" and node.unique_id.startswith("test.") and node.compiled]
    if not failed or not marts.is_file() or not work.is_file():
        return {}
    found: Rows = {}
    with connect_delta() as connection:  # the staging models are views into the lakehouse
        connection.execute(f"attach {literal(marts)} as marts (read_only)")
        connection.execute(f"attach {literal(work)} as work (read_only)")
        for node in failed:
            with contextlib.suppress(duckdb.Error):
                rows = connection.execute(f"select * from ({node.compiled}\n) limit {ROWS_KEPT}").fetchall()
                names = [column[0] for column in connection.description or []]
                found[node.unique_id] = [dict(zip(names, row, strict=True)) for row in rows]
    plain: Rows = json.loads(json.dumps(found, default=str))
    return plain


def _first_row(rows: Rows) -> str:
    row = next((found[0] for found in rows.values() if found), {})
    return one_line(", ".join(f"{name} {value}" for name, value in row.items() if value is not None), 120)
