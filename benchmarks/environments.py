"""Python environments of contestants under the work folder, each made once: they cannot share one with Spark."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import BenchmarkError


def environment(folder: Path, requirements: Sequence[str], *, alone: bool = False) -> Path:
    """Return the interpreter of the environment in ``folder``; install it if it is missing or has other ``requirements``.

    A requirement is a line as in a requirements file. If one has a hash, pip accepts no other file. With ``alone`` nothing that
    they depend on is installed. Needs the network to install.
    """
    python = folder / "bin" / "python"
    complete = folder / ".complete"
    wanted = "\n".join(requirements)
    if complete.exists() and complete.read_text() == wanted:
        return python
    options = ["--no-deps"] if alone else []
    listed = folder.with_name(f"{folder.name}.txt")
    listed.write_text(wanted)
    if shutil.which("uv"):
        run_command(["uv", "venv", "--clear", "--python", "3.11", str(folder)])
        run_command(["uv", "pip", "install", "-p", str(python), *options, "-r", str(listed)])
    else:
        run_command([sys.executable, "-m", "venv", "--clear", str(folder)])
        run_command([str(python), "-m", "pip", "install", "-q", *options, "-r", str(listed)])
    complete.write_text(wanted)
    return python


def run_command(command: list[str]) -> None:
    """Run a command. Raises BenchmarkError with the end of its output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)[:200]} failed:\n{(done.stdout + done.stderr)[-1500:]}")
