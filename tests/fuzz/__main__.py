"""Fuzz one target, or all, for some minutes: ``python -m tests.fuzz event-lines --minutes 60 --seed 1``.

A failing input is made as short as possible and put into the corpus, tests/cases/fuzz/<target>/. Exit status 1 if one was found.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.fuzz import run_for
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Run the targets one after the other; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    chosen = parser.parse_args()
    is_failed = False
    for target in TARGETS.values() if chosen.target == "all" else [TARGETS[chosen.target]]:
        with tempfile.TemporaryDirectory() as folder:
            found = run_for(
                target,
                Path(folder),
                minutes=chosen.minutes,
                number=chosen.seed,
                clock=time.monotonic,
                say=lambda line: print(line, flush=True),
            )
        if found is not None:
            is_failed = True
            print(f"  kept as {found.save()}", flush=True)
    return int(is_failed)


if __name__ == "__main__":
    sys.exit(main())
