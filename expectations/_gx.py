"""Imports Great Expectations: without Spark, and without calling home."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

os.environ["GX_ANALYTICS_ENABLED"] = "False"  # Great Expectations reads it at import; with it, nothing calls home


@contextmanager
def _without_spark() -> Iterator[None]:
    """Hide PySpark, which Great Expectations imports where it is installed: no suite of ours needs it.

    The import of PySpark takes a third of the whole import. And Spark Connect mistakes a process without a main file, such as that
    of a Dagster run, for its own doctests and ends it.
    """
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "pyspark"}
    sys.modules["pyspark"] = None  # type: ignore[assignment] # this is how Python says that there is none
    try:
        yield
    finally:
        del sys.modules["pyspark"]
        sys.modules.update(hidden)


with _without_spark():
    import great_expectations as gx
    import great_expectations.expectations as gxe

__all__ = ["gx", "gxe"]
