"""Runs tests in forked processes: once traced, and then against one mutant at a time."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal, NoReturn

from tests.mutation.operators import Mutant, mutated

Outcome = Literal["killed", "timeout", "survived", "not run"]

_MOST_TESTS = 60  # of a mutant
_MOST_SECONDS = 60.0  # of its tests, as traced
_PATIENCE = 4.0  # a mutant may take so many times as long as its tests took
_FAST = "not homes and not crash and not services and not soak and not e2e"
_NEEDS_SPARK = {"spark", "kafka", "store", "browser"}  # fixtures that start programs
_PACKAGES = (
    *("pytest", "hypothesis", "numpy", "pyarrow.compute", "pyarrow.parquet", "pyarrow.dataset", "duckdb", "deltalake", "obstore"),
    *("pydantic_settings", "msgspec", "pyspark.sql", "playwright.sync_api", "rich.console", "typer"),
)


@dataclass(frozen=True)
class TracedTests:
    """What each test takes in seconds, and which lines of which modules it runs."""

    seconds: dict[str, float]
    lines: dict[str, dict[str, frozenset[int]]]

    def of(self, path: str, line: int) -> list[str]:
        """Return the tests that run a line, the quickest first; for a line that only an import runs, those that use the module."""
        running = [test for test, modules in self.lines.items() if line in modules.get(path, ())]
        found = running or [test for test, modules in self.lines.items() if modules.get(path)]
        return sorted(found, key=self.seconds.__getitem__)


def trace(root: Path, tests: Sequence[str], paths: Sequence[str], scratch: Path, *, with_spark: bool) -> TracedTests:
    """Run the tests under ``root`` once, and note what each of them runs. Raises RuntimeError if they fail as they are."""
    for name in _PACKAGES:
        importlib.import_module(name)
    result = scratch / "traced.json"

    def run() -> int:
        tracer = _Tracer(root, paths, with_spark=with_spark)
        status = _pytest([*tests, "-m", _FAST], scratch, tracer)
        result.write_text(json.dumps({"seconds": tracer.seconds, "lines": tracer.as_lists()}))
        return status

    log = scratch / "pytest.log"
    status = _forked(root, run, 3600, log)
    if status != 0:
        raise RuntimeError(f"the tests fail without any change (pytest's status {status}):\n{log.read_text()[-3000:]}")
    found = json.loads(result.read_text())
    lines = {test: {path: frozenset(at) for path, at in modules.items()} for test, modules in found["lines"].items()}
    return TracedTests(found["seconds"], lines)


def judge(root: Path, path: str, mutant: Mutant, traced: TracedTests, scratch: Path) -> Outcome:
    """Run the tests that may notice a mutant, until one does."""
    chosen: list[str] = []
    seconds = 0.0
    for test in traced.of(path, mutant.line)[:_MOST_TESTS]:
        if chosen and seconds + traced.seconds[test] > _MOST_SECONDS:
            break
        chosen.append(test)
        seconds += traced.seconds[test]
    if not chosen:
        return "not run"
    tree = mutated((root / path).read_text("utf-8"), mutant.number)
    name = path.removesuffix(".py").replace("/", ".")

    def run() -> int:
        sys.meta_path.insert(0, _MutantFinder(name, root / path, compile(tree, str(root / path), "exec")))
        return _pytest([*chosen, "-x"], scratch)

    status = _forked(root, run, 20 + _PATIENCE * seconds, scratch / "pytest.log")
    return "timeout" if status is None else "killed" if status else "survived"


def _pytest(arguments: list[str], scratch: Path, *plugins: object) -> int:
    import pytest

    quiet = ["-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "--basetemp", str(scratch / "tests")]
    return int(pytest.main([*arguments, *quiet], plugins=list(plugins)))


def _forked(root: Path, run: Callable[[], int], seconds: float, log: Path) -> int | None:
    """Return the status of ``run`` in a forked process; None if it took too long. Its whole process group ends."""
    child = os.fork()
    if child == 0:
        _run_alone(root, run, log)
    until = time.monotonic() + seconds
    status: int | None = None
    while status is None and time.monotonic() < until:
        done, raw = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(raw)
        else:
            time.sleep(0.01)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    return status


def _run_alone(root: Path, run: Callable[[], int], log: Path) -> NoReturn:
    """End this process with the status of ``run``, as the leader of a group, with its output in ``log``."""
    status = 99
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(root)
        sys.path.insert(0, str(root))
        status = run()
    finally:
        os._exit(status)


class _MutantFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from the mutant's code."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self._name, self._path, self._code = name, path, code

    def find_spec(self, name: str, _path: object, _target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self._path, loader=self) if name == self._name else None

    def exec_module(self, module: Any) -> None:
        exec(self._code, module.__dict__)


class _Tracer:
    """A plugin of pytest that notes the lines of ``paths`` that each test runs, and its seconds."""

    def __init__(self, root: Path, paths: Sequence[str], *, with_spark: bool) -> None:
        self._names = {str(root / path): path for path in paths}
        self._with_spark = with_spark
        self._lines: dict[str, set[int]] = {}
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, dict[str, set[int]]] = {}

    def as_lists(self) -> dict[str, dict[str, list[int]]]:
        return {test: {path: sorted(at) for path, at in modules.items()} for test, modules in self.lines.items()}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if not self._with_spark:
            items[:] = [item for item in items if not _NEEDS_SPARK & set(item.fixturenames)]

    def pytest_runtest_setup(self, item: Any) -> None:
        self._lines = {}
        self.lines[item.nodeid] = self._lines
        self.seconds[item.nodeid] = -time.monotonic()
        threading.settrace(self._trace_call)
        sys.settrace(self._trace_call)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        self.seconds[nodeid] += time.monotonic()

    def _trace_call(self, frame: FrameType, _event: str, _argument: object) -> Any:
        path = self._names.get(frame.f_code.co_filename)
        if path is None:
            return None
        lines = self._lines.setdefault(path, set())

        def trace_line(frame: FrameType, event: str, _argument: object) -> Any:
            if event == "line":
                lines.add(frame.f_lineno)
            return trace_line

        lines.add(frame.f_lineno)
        return trace_line
