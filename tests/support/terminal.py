"""The command as a person meets it: exit status, standard output, standard error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-m", "orchestration.cli")
# Python code by which a process hears signals, whatever it was started by: a job in the background is started deaf to SIGINT.
HEARS_SIGNALS = """
import signal
signal.pthread_sigmask(signal.SIG_SETMASK, ())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
"""
_HEARING = (sys.executable, "-c", f"{HEARS_SIGNALS}import os, sys\nos.execv(sys.argv[1], sys.argv[1:])")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error, without its beginning. Fails if it is not exactly that."""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("adtally: error: "), self.err
        return self.err.removeprefix("adtally: error: ").rstrip("\n")


Adtally = Callable[..., Done]
"""Runs the command with its arguments."""


def environment(**changes: str | None) -> dict[str, str]:
    """That of this process, with the project importable and no settings; a change to None removes a variable.

    Output is buffered as it is for a person, whatever this process does: a closed pipe then shows at the end only.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ADTALLY_") or name == "ADTALLY_CACHE_DIR"}
    changed: dict[str, str | None] = {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": None, **changes}
    return {name: value for name, value in changed.items() if value is not None}


def spawn(*arguments: str, cwd: Path, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start the command with all its streams as pipes. It hears signals."""
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*_HEARING, *PROGRAM, *arguments], cwd=cwd, env=env or environment(), text=True, **streams)


def run(*arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 120) -> Done:
    """Run the command as a process of its own."""
    with spawn(*arguments, cwd=cwd, env=env) as process:
        out, err = process.communicate(timeout=timeout)
    return Done(process.returncode, out, err)
