"""Keep Arrow from importing pandas, which nothing of the ingest needs.

Arrow imports pandas with the first list or scalar that it gets, to see whether that is a frame. It takes half a second of a core.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder


class _NoPandas(MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ImportError(name)


def hide_pandas() -> None:
    """Make pandas look as if it was not installed, for the life of this process."""
    sys.meta_path.insert(0, _NoPandas())
