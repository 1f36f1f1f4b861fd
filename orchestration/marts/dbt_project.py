"""The dbt project: where it is, what it is hashed to, and the results of its models and tests."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spark_jobs.errors import AdtallyError, MachineError
from spark_jobs.failure import one_line
from spark_jobs.texts import counted

ROWS_KEPT = 20
_FORMAT = 1  # of the file of the marts: another one is built from all days


Rows = dict[str, list[dict[str, object]]]
"""Test (dbt's unique id) -> the first rows that it found."""


def project_version(project: Path) -> str:
    """Version of the dbt project in ``project``, as its dbt_project.yml says."""
    import yaml  # here, since the command line imports this module

    loaded: dict[str, Any] = yaml.safe_load((project / "dbt_project.yml").read_text("utf-8"))
    return str(loaded["version"])


def project_hash(project: Path) -> str:
    """Hash of all that decides what the marts contain: models, contracts, macros, settings and the database, without the tests."""
    folders = [(project / folder, ending) for folder in ("models", "macros", "seeds") for ending in ("*.sql", "*.yml", "*.csv")]
    files = [path for folder, ending in folders for path in folder.rglob(ending) if "unit_tests" not in path.name]
    found = hashlib.sha256(f"{_FORMAT} {version('duckdb')}".encode())
    for path in sorted([project / "dbt_project.yml", *files]):
        content = path.read_bytes()
        found.update(f"{path.relative_to(project).as_posix()}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()[:32]


@dataclass(frozen=True)
class DbtNode:
    """The result of a model or a test. ``failures``: rows that a test found."""

    unique_id: str
    status: str
    seconds: float
    failures: int
    message: str

    @property
    def passed(self) -> bool:
        """Whether it was built, or tested without an error. A test that only warns has passed."""
        return self.status in ("success", "pass", "warn")

    @property
    def failed(self) -> bool:
        """Whether it could not be built or tested, or its test found rows."""
        return self.status in ("error", "fail")

    @property
    def label(self) -> str:
        """Its kind, its name and why it failed."""
        # test.adtally.<name>.<hash> · model.adtally.<name>
        kind, _, name, *_ = self.unique_id.split(".")
        reason = f" ({counted(self.failures, 'row')})" if self.status == "fail" else f": {one_line(self.message, 160)}"
        return f"{kind} {name}{reason}"


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
