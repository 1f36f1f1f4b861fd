"""Imports Great Expectations before anything else of this package does, in a way that works in every process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

os.environ["GX_ANALYTICS_ENABLED"] = "False"  # read at import: nothing calls home


@contextmanager
def _main_has_a_file() -> Iterator[None]:
    """Great Expectations imports Spark Connect, which takes a process without a main file for its own doctests and ends it.

    A process that multiprocessing has spawned, such as that of a Dagster run, has none.
    """
    main = sys.modules["__main__"]
    if hasattr(main, "__file__") or main.__spec__ is not None:
        yield
        return
    main.__file__ = sys.executable
    try:
        yield
    finally:
        del main.__file__


with _main_has_a_file():
    import great_expectations as gx

__all__ = ["gx"]
