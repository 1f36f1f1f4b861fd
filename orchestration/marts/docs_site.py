"""The documentation of the dbt project as one HTML file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestration.marts.dbt_runner import DbtFolders, install_delta_extension, project_dir, run_dbt
from spark_jobs import disk
from spark_jobs.config import Settings


@dataclass(frozen=True)
class MartDocs:
    """The page that was written."""

    path: Path


def build_docs(settings: Settings, *, progress: Callable[[str], None] | None = None) -> MartDocs:
    """Write dbt's documentation of models, columns, tests, metrics and their lineage to ``docs/index.html`` beside the marts.

    The page needs no server and no network. It describes the project, so it reads neither the lakehouse nor the published marts.
    Raises DbtError if dbt fails.
    """
    install_delta_extension()
    path = settings.marts_path.parent / "docs" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".docs-", dir=path.parent) as work:
        folders = DbtFolders(Path(work), Path(work) / "logs")
        run_dbt(
            "docs",
            project=project_dir(),
            folders=folders,
            variables={},
            environment={},
            selection=["generate", "--static", "--empty-catalog", "--no-populate-cache"],
            progress=progress,
        )
        disk.replace(folders.target / "static_index.html", path)
    return MartDocs(path)
