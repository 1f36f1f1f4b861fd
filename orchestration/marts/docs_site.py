"""The documentation of the dbt project as one HTML file."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from orchestration.marts.dbt_project import project_dir
from orchestration.marts.manifest import invoke_dbt
from spark_jobs import disk
from spark_jobs.config import Settings


@dataclass(frozen=True)
class MartDocs:
    """The page that was written."""

    path: Path


def build_docs(settings: Settings) -> MartDocs:
    """Write dbt's documentation of models, columns, tests, metrics and their lineage to ``docs/index.html`` beside the marts.

    The page needs no server and no network. It describes the project, so it reads neither the lakehouse nor the published marts.
    Raises RuntimeError if dbt fails.
    """
    path = settings.marts_path.parent / "docs" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".docs-", dir=path.parent) as work:
        invoke_dbt(project_dir(), Path(work), "docs", "generate", "--static", "--empty-catalog", "--no-populate-cache")
        disk.replace(Path(work) / "static_index.html", path)
    return MartDocs(path)
