"""Spark's daemon that forks the Python workers of the tasks: ``spark.python.daemon.module``.

Its workers load no pandas, import PySpark from its installed files, and keep the memory that they free.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import sys
from pathlib import Path

from spark_jobs.no_pandas import hide_pandas

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
_MMAP_BYTES = 32 * 1024 * 1024  # the largest threshold that glibc accepts: above it, a block returns to the system when it is freed
_KEPT_BYTES = 512 * 1024 * 1024


def without_packed_pyspark(path: list[str]) -> list[str]:
    """Return a search path without the ZIP files of an installed PySpark whose own files are on it.

    Spark puts the ZIP files first. They have no bytecode, so each daemon would compile what it imports: half a second of a core.
    """
    installed = {(Path(entry) / "pyspark" / "python" / "lib").resolve() for entry in path}
    return [entry for entry in path if not (entry.endswith(".zip") and Path(entry).parent.resolve() in installed)]


def keep_freed_memory() -> None:
    """Make malloc keep freed memory for the next array, instead of fetching new pages for each. Does nothing without glibc.

    The columns of a chunk are freed with it, and the next chunk needs as many. Without this more than a tenth of a batch's CPU time
    is page faults.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


if __name__ == "__main__":
    hide_pandas()
    keep_freed_memory()
    sys.path[:] = without_packed_pyspark(sys.path)
    # Workers need both and are forked from here. What else they import starts threads, which a fork would lose.
    for name in ("numpy", "spark_jobs.config"):
        importlib.import_module(name)
    from pyspark.daemon import manager

    manager()
