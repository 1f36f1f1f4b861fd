"""The package can be imported in the process of a Dagster run, whose main module has neither a file nor a spec."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_process_without_a_main_file_can_import_the_package() -> None:
    code = "import expectations, sys; print(expectations.__name__, hasattr(sys.modules['__main__'], '__file__'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "expectations False\n"), done.stderr
