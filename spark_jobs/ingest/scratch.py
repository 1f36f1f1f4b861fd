"""Where the tasks of a batch keep parsed rows between its two passes. Runs in Spark's Python workers.

On one machine it is a folder under HOME/scratch, which the driver removes. On a cluster each executor has its own, in the folders
that Spark gives it: on whatever disk, and gone with the executor. What another executor has parsed is then parsed again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


def scratch_folder(scratch: str) -> Path:
    """The folder of a batch: ``scratch`` itself where it is a path, else a folder of this executor with this name."""
    return Path(scratch) if os.path.isabs(scratch) else _own() / scratch


def forget_earlier_batches(scratch: str) -> None:
    """Remove what this executor still holds of earlier batches of a query; the driver cannot. ``scratch`` is <query>-<batch>."""
    if os.path.isabs(scratch):
        return
    query, _, batch = scratch.rpartition("-")
    for folder in _own().glob(f"{query}-*"):
        number = folder.name.removeprefix(f"{query}-")
        if number.isdecimal() and int(number) < int(batch):
            shutil.rmtree(folder, ignore_errors=True)


def _own() -> Path:
    local = os.environ.get("SPARK_LOCAL_DIRS", "").split(",")[0]  # Spark says it to its Python workers
    return Path(local or tempfile.gettempdir()) / "adtally"
