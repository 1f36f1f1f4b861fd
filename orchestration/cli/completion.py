"""Values that a shell completes. This module imports nothing heavy at its top, so that an answer comes at once."""

from __future__ import annotations

import os
from pathlib import Path

import typer

_SHOWN = 50


def named_queries(incomplete: str) -> list[tuple[str, str]]:
    """Return the named queries that begin with the typed text, each with its meaning."""
    from services.serving.named import named_queries as known

    return [(query.name, query.meaning) for query in known() if query.name.startswith(incomplete)]


def campaigns(context: typer.Context, incomplete: str) -> list[str]:
    """Return the campaigns of the published marts that begin with the typed text; none without marts."""
    import duckdb

    home = context.find_root().params.get("home") or os.environ.get("ADTALLY_HOME") or ".adtally"
    sql = f"select distinct campaign_id from fct_campaign_day where starts_with(campaign_id, ?) order by 1 limit {_SHOWN}"
    try:
        with duckdb.connect(str(Path(home) / "marts" / "marts.duckdb"), read_only=True) as marts:
            return [str(name) for (name,) in marts.execute(sql, [incomplete]).fetchall()]
    except duckdb.Error:
        return []
