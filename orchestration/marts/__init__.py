"""The marts: built by dbt in a new DuckDB file, checked there, published by one rename."""

from orchestration.marts.build import MartBuild, build_marts
from orchestration.marts.query import query_marts
from orchestration.marts.render import FORMATS, render

__all__ = ["FORMATS", "MartBuild", "build_marts", "query_marts", "render"]
