"""Lint what ruff and mypy do not see: the SQL, the dbt project and the Dagster definitions."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def main() -> int:
    """Run every check; 0 if all passed. The output of a check is shown when it fails."""
    with tempfile.TemporaryDirectory(prefix="adtally-lint-") as work:
        dbt = [
            "--project-dir",
            "dbt_project",
            "--profiles-dir",
            "dbt_project",
            "--target-path",
            work,
            "--log-path",
            work,
        ]
        checks: dict[str, list[str]] = {
            "sqlfluff": ["sqlfluff", "lint", "--disable-progress-bar", "--processes", "2", "dbt_project"],
            "dbt parse": [
                "dbt",
                "--no-send-anonymous-usage-stats",
                "--warn-error",
                "parse",
                "--no-partial-parse",
                *dbt,
            ],
            "dagster definitions": [
                "dagster",
                "definitions",
                "validate",
                "-w",
                "workspace.yaml",
                "--log-level",
                "warning",
            ],
        }
        environment = os.environ | {
            "DAGSTER_HOME": work,
            "DAGSTER_DISABLE_TELEMETRY": "yes",
            "DO_NOT_TRACK": "1",
            "GX_ANALYTICS_ENABLED": "False",
        }
        failed = [name for name, command in checks.items() if not _passes(name, command, environment)]
    return 1 if failed else 0


def _passes(name: str, command: list[str], environment: dict[str, str]) -> bool:
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(f"{name}: {'passed' if done.returncode == 0 else 'FAILED'}", flush=True)
    if done.returncode != 0:
        print(done.stdout, flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
