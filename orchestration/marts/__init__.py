"""The marts: the days that changed, built by dbt's SQL in a new DuckDB file, checked there, published by one rename."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestration.marts.build import MartBuild, build_marts
    from orchestration.marts.query import query_marts

__all__ = ["MartBuild", "build_marts", "query_marts"]

_MODULES = {"MartBuild": "build", "build_marts": "build", "query_marts": "query"}


def __getattr__(name: str) -> Any:
    """Load what a build or a query needs when it is first used: a query needs neither dbt nor Arrow."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
