"""Mutation tests: change one thing in the code at a time, and see whether the fast tests notice.

    python -m tests.mutation spark_jobs/billing                          all mutants of a folder or file
    python -m tests.mutation spark_jobs/billing --sample 100 --seed 1    a hundred of them
    python -m tests.mutation spark_jobs/units.py --tests tests/spark_jobs/attribution

The tests are those of the folder in tests/ with the same path, or ``--tests``. Each is traced once; a mutant is then judged by the
tests that run its line, the quickest first, in a process forked from one that has imported all packages and none of our modules.
Tests that start a Spark or other services are left out unless ``--spark`` is given. A mutant that no test notices is printed with
its line; `explained.toml` lists those that change nothing anyone can see, each with the reason, and they do not count.

Exit status 1: with ``--at-least`` percent, fewer mutants were killed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from tests.mutation.operators import Mutant, mutants
from tests.mutation.runs import Outcome, TracedTests, judge, trace

ROOT = Path(__file__).resolve().parents[2]
EXPLAINED = Path(__file__).with_name("explained.toml")


@dataclass(frozen=True)
class Judged:
    """A mutant of a file, and what its tests did."""

    path: str
    line: int
    before: str
    after: str
    outcome: Outcome


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    root = Path(args.root).resolve()
    paths = sorted(path for target in args.targets for path in _modules(root, root / target))
    if not paths:
        print(f"error: no module in {' '.join(args.targets)}", file=sys.stderr)
        return 2
    tests = args.tests or sorted({_mirror(root, target) for target in args.targets})
    every = [(path, mutant) for path in paths for mutant in mutants((root / path).read_text("utf-8"))]
    chosen = every if args.sample is None else random.Random(args.seed).sample(every, min(args.sample, len(every)))
    console = Console(stderr=True)
    console.print(f"{len(chosen):,} of {len(every):,} mutants of {len(paths)} modules; tracing {' '.join(tests)}")
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        traced = trace(root, tests, paths, Path(scratch), with_spark=args.spark)
        judged = _judge_all(root, chosen, traced, Path(scratch), console)
    explained = _explained()
    survivors = [one for one in judged if one.outcome in ("survived", "not run")]
    open_ones = [one for one in survivors if (one.path, one.before, one.after) not in explained]
    counted = len(judged) - (len(survivors) - len(open_ones))
    killed = counted - len(open_ones)
    percent = 100 * killed / counted if counted else 100.0
    for one in sorted(open_ones, key=lambda one: (one.path, one.line)):
        print(f"{one.path}:{one.line}: {one.outcome}\n    - {one.before}\n    + {one.after}")
    print(f"{killed:,} of {counted:,} mutants killed: {percent:.1f} % ({len(survivors) - len(open_ones)} more are explained)")
    if args.json:
        print(
            json.dumps({"killed": killed, "counted": counted, "percent": round(percent, 1), "open": [asdict(o) for o in open_ones]})
        )
    return 1 if percent < args.at_least else 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.split("\n", 1)[0] if __doc__ else None)
    made.add_argument("targets", nargs="+", help="folders or files of our packages, from the project's root")
    made.add_argument("--tests", nargs="*", help="folders or files of tests; default: those that mirror the targets")
    made.add_argument("--sample", type=int, help="so many mutants, chosen by the seed; default: all")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--spark", action="store_true", help="also tests that start a Spark, a store or other services")
    made.add_argument("--at-least", type=float, default=0, help="percent that must be killed")
    made.add_argument("--root", default=ROOT, help="of another project")
    made.add_argument("--json", action="store_true", help="the last line is a JSON object")
    return made


def _modules(root: Path, target: Path) -> list[str]:
    found = sorted(target.rglob("*.py")) if target.is_dir() else [target] if target.exists() else []
    return [str(path.relative_to(root)) for path in found if path.name != "__init__.py"]


def _mirror(root: Path, target: str) -> str:
    """Return the tests of a folder or file: the nearest path in tests/ that exists."""
    path = Path(target)
    named = root / "tests" / path.parent / f"test_{path.stem}.py"
    if named.exists():
        return str(named.relative_to(root))
    folder = path if (root / target).is_dir() else path.parent
    while not (root / "tests" / folder).is_dir():
        folder = folder.parent
    return str(Path("tests") / folder)


def _judge_all(root: Path, chosen: list[tuple[str, Mutant]], traced: TracedTests, scratch: Path, console: Console) -> list[Judged]:
    judged = []
    with Progress(console=console) as progress:
        task = progress.add_task("mutants", total=len(chosen))
        for path, mutant in chosen:
            outcome = judge(root, path, mutant, traced, scratch)
            judged.append(Judged(path, mutant.line, mutant.before, mutant.after, outcome))
            progress.advance(task)
    return judged


def _explained() -> set[tuple[str, str, str]]:
    entries = tomllib.loads(EXPLAINED.read_text("utf-8")).get("mutant", [])
    return {(entry["path"], entry["before"], entry["after"]) for entry in entries if entry["reason"]}


if __name__ == "__main__":
    sys.exit(main())
