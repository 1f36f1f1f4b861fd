"""The import directions, held by reading the sources."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "spark_jobs": {"dagster", "dagster_dbt", "dbt", "expectations", "orchestration", "services", "samples"},
    "expectations": {"dagster", "dagster_dbt", "dbt", "spark_jobs", "orchestration", "services", "samples"},
    "services": {"dagster", "orchestration", "expectations", "samples"},
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


# --- who may import whom inside spark_jobs and services, directly or through others

NEUTRAL = {
    "actor",
    "background",
    "config",
    "disk",
    "errors",
    "failure",
    "no_pandas",
    "private",
    "steps",
    "texts",
    "toml_text",
    "units",
}
"""Modules that read, judge, compare and price no record."""

AUDITED = {"attribution", "billing", "ingest", "lake", "publish", "rules", "traffic"}


LAUNCHER_MAY_IMPORT = {"spark_jobs.config", "spark_jobs.errors", "spark_jobs.jars", "spark_jobs.java"}
"""The launcher resolves its jars as Spark's are resolved. All other services import nothing of spark_jobs."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: an import that is not absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@cache
def graph() -> dict[str, set[str]]:
    """Each module of spark_jobs and services, and those of both that it imports itself."""
    roots = {"spark_jobs", "services"}
    paths = {module_of(path): path for root in roots for path in (ROOT / root).rglob("*.py")}
    return {name: {one for one in imports_of(path) if one in paths.keys() - roots} for name, path in paths.items()}


def reached_from(module: str) -> set[str]:
    """The modules that ``module`` imports, directly or through others."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for name in graph()[waiting.pop()] - found:
            found.add(name)
            waiting.append(name)
    return found


def capability(module: str) -> str:
    """The folder of a module right under spark_jobs, or the module there."""
    return module.split(".")[1] if "." in module else module


def modules_in(*capabilities: str) -> list[str]:
    return [name for name in graph() if name.startswith("spark_jobs") and capability(name) in capabilities]


def test_the_auditor_reaches_nothing_that_it_audits() -> None:
    modules = modules_in("audit")
    assert modules
    wrong = {name: {one for one in reached_from(name) if capability(one) not in {"audit", "lake", *NEUTRAL}} for name in modules}
    assert not {name: found for name, found in wrong.items() if found}


def test_the_auditor_reaches_no_code_that_writes_chains() -> None:
    writers = {"spark_jobs.lake.chain", "spark_jobs.lake.acts"}
    assert writers <= graph().keys()
    assert not {name for name in modules_in("audit") if reached_from(name) & writers}


def test_nothing_that_is_audited_reaches_the_auditor() -> None:
    modules = modules_in(*AUDITED)
    assert modules
    wrong = {name: {one for one in reached_from(name) if capability(one) == "audit"} for name in modules}
    assert not {name: found for name, found in wrong.items() if found}


def test_the_lake_knows_no_capability() -> None:
    wrong = {name: {capability(one) for one in reached_from(name)} - {"lake", *NEUTRAL} for name in modules_in("lake")}
    assert not {name: found for name, found in wrong.items() if found}


def test_the_raw_copy_shares_no_reader_with_the_ingest() -> None:
    """It may share where its query stands (config, source, query), never how records are read, cut or judged."""
    readers = ("contract", "dedupe", "files", "kafka.ranges", "kafka.reading", "stage", "write", "event_columns")
    direct = graph()["spark_jobs.ingest.kafka.raw"]
    assert not {name for name in direct for reader in readers if name.startswith(f"spark_jobs.ingest.{reader}")}


def test_of_the_services_only_the_launcher_imports_spark_jobs() -> None:
    direct = {
        name: {one for one in found if one.startswith("spark_jobs.")}
        for name, found in graph().items()
        if name.startswith("services")
    }
    launcher = {name for name in direct if name.startswith("services.launcher")}
    assert set().union(*(direct[name] for name in launcher)) <= LAUNCHER_MAY_IMPORT
    assert not {name: found for name, found in direct.items() if found and name not in launcher}


@pytest.mark.parametrize("service", ["simulator", "budget"])
def test_simulator_and_budget_reach_nothing_of_spark_jobs(service: str) -> None:
    """The simulator's truth is a judge of spark_jobs; the budget service runs without the rest of adtally."""
    modules = [name for name in graph() if name.startswith(f"services.{service}")]
    assert modules
    wrong = {name: {one for one in reached_from(name) if one.startswith("spark_jobs")} for name in modules}
    assert not {name: found for name, found in wrong.items() if found}


# --- the lake is the only code that opens, scans and commits Delta tables

OF_THE_LAKE = {
    "deltalake": re.compile(r"^\s*(?:from|import) deltalake\b", re.MULTILINE),
    "delta_scan(": re.compile(r"\bdelta_scan\("),
    "get_add_actions": re.compile(r"\bget_add_actions\b"),
    "_delta_log": re.compile(r"\b_delta_log\b"),
    "a disk or a store": re.compile(r"""\b(is_local|is_remote|local_path)\b|["']://["']"""),
    "quotes escaped by hand": re.compile(r"""replace\(["']'["'], ["']''["']\)"""),
}


def lake_code_outside(texts: dict[str, str]) -> dict[str, list[str]]:
    """What of OF_THE_LAKE each module has, by its source text; modules without any are left out."""
    found = {name: [what for what, pattern in OF_THE_LAKE.items() if pattern.search(text)] for name, text in texts.items()}
    return {name: whats for name, whats in found.items() if whats}


def test_only_the_lake_opens_scans_and_commits_tables() -> None:
    texts = {
        module_of(path): path.read_text("utf-8")
        for package in ("spark_jobs", "orchestration")
        for path in (ROOT / package).rglob("*.py")
        if not path.is_relative_to(ROOT / "spark_jobs" / "lake")
    }
    assert lake_code_outside(texts) == {}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("from deltalake import DeltaTable", "deltalake"),
        ("    import deltalake", "deltalake"),
        ('sql = f"from delta_scan({path})"', "delta_scan("),
        ("held.get_add_actions(flatten=True)", "get_add_actions"),
        ('folder / "_delta_log"', "_delta_log"),
        ('if "://" in uri:', "a disk or a store"),
        ("if is_local(settings.lakehouse_uri):", "a disk or a store"),
        ("""text.replace("'", "''")""", "quotes escaped by hand"),
    ],
)
def test_code_of_the_lake_is_recognised(line: str, what: str) -> None:
    assert lake_code_outside({"module": f"x = 1\n{line}\n", "other": "x = 1\n"}) == {"module": [what]}
