"""The import directions, held by reading the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "spark_jobs": {"dagster", "dagster_dbt", "dbt", "expectations", "orchestration", "services", "samples"},
    "expectations": {"dagster", "dagster_dbt", "dbt", "spark_jobs", "orchestration", "services", "samples"},
    "services": {"dagster", "spark_jobs", "orchestration", "expectations", "samples"},
    "samples": {"dagster", "spark_jobs", "orchestration", "expectations"},
}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_point_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): imported(path) & FORBIDDEN[package] for path in files}
    assert not {path: names for path, names in wrong.items() if names}


def test_one_module_builds_the_session() -> None:
    builders = [
        path.relative_to(ROOT).as_posix()
        for package in ("spark_jobs", "orchestration", "expectations")
        for path in (ROOT / package).rglob("*.py")
        if "SparkSession.builder" in path.read_text("utf-8")
    ]
    assert sorted(builders) == ["spark_jobs/jars.py", "spark_jobs/session.py"]


# what the recount may use of spark_jobs: none of it reads, judges, compares or prices a record
OF_THE_RECOUNT = {"config", "delta_log", "disk", "duck", "errors", "failure", "recount", "storage", "tables", "texts", "units"}


def modules_of_spark_jobs(path: Path) -> set[str]:
    """The modules right under spark_jobs that a file imports, anywhere in it; "." for an import that is not absolute."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = ["spark_jobs.."] if isinstance(node, ast.ImportFrom) else []
        found |= {[*name.split("."), ""][1] or "." for name in names if name.split(".")[0] == "spark_jobs"}
    return found


def test_the_recount_shares_nothing_with_what_it_judges() -> None:
    files = list((ROOT / "spark_jobs" / "recount").rglob("*.py"))
    assert files
    wrong = {path.name: modules_of_spark_jobs(path) - OF_THE_RECOUNT for path in files}
    assert not {name: modules for name, modules in wrong.items() if modules}
    # nor does what it may use lead there
    shared = [ROOT / "spark_jobs" / f"{name}.py" for name in OF_THE_RECOUNT - {"recount"}]
    assert not {path.name: leads for path in shared if (leads := modules_of_spark_jobs(path) - OF_THE_RECOUNT)}


def imports_of(path: Path) -> set[str]:
    """The modules of spark_jobs that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("spark_jobs.")}


# corrections carry out what the audit found; fsck repairs by them. All else writes what the audit judges.
USE_THE_RECOUNT = {"jobs/correct.py", "jobs/reconcile.py", "jobs/backfill.py"}


def test_nothing_that_is_audited_imports_the_auditor() -> None:
    package = ROOT / "spark_jobs"
    audited = [path for path in package.rglob("*.py") if "recount" not in path.relative_to(package).parts[:1]]
    wrong = {
        path.relative_to(package).as_posix()
        for path in audited
        if any(name.startswith("spark_jobs.recount") for name in imports_of(path))
    }
    assert wrong == USE_THE_RECOUNT


# what the raw copy may share with the ingest: where its query stands, never how records are read
OF_THE_RAW_COPY = {"spark_jobs.kafka.config", "spark_jobs.kafka.source"}


def test_the_raw_copy_shares_no_reader_with_the_ingest() -> None:
    path = ROOT / "spark_jobs" / "kafka" / "raw.py"
    packages = ("kafka", "contract", "dedupe", "tasks", "sources.lines", "sources.landing", "transforms.events")
    shared = {name for name in imports_of(path) for package in packages if name.startswith(f"spark_jobs.{package}.")}
    assert {name for name in shared if not any(name.startswith(known) for known in OF_THE_RAW_COPY)} == set()
