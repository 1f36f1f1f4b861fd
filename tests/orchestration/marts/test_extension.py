"""DuckDB's extension on a machine on which nothing has used DuckDB before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import duckdb
from orchestration.marts.dbt_plugin import Plugin
plugin, config = Plugin("adtally", {"lakehouse": ""}), {}
plugin.update_connection_config(None, config)
with duckdb.connect(":memory:", config=config) as connection:  # as dbt does it
    plugin.configure_connection(connection)
    print(connection.execute("select count(*) from duckdb_functions() where function_name = 'delta_scan'").fetchone()[0] > 0)
"""


def test_a_user_without_any_extension_can_build_marts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
