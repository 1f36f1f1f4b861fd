"""The law of the books: offered = accepted + duplicate + conflict + rejected, for each region and hour."""

from __future__ import annotations

from typing import Any

from orchestration.console.tables import Row
from orchestration.console.view import View

OUTCOMES = ("accepted", "duplicate", "conflict", "rejected")


def law_by_region(view: View) -> dict[str, Any]:
    """Per region the offered records and their outcomes over the page's days; ``rest`` is what does not add up.

    ``different``: rows of the newest recounts that found a difference which is not repaired; ``recounted_at``: the newest recount.
    """
    rows = view.rows(
        f"""
        select coalesce(region, 'unknown') as region, sum(offered)::bigint as offered,
            {", ".join(f"sum({name})::bigint as {name}" for name in OUTCOMES)}, sum(late)::bigint as late
        from fct_event_accounting
        where {view.where(region="region")} and coalesce(event_hour::date, $last) between $first and $last
        group by all order by 1
        """
    )
    for row in rows:
        row["rest"] = row["offered"] - sum(row[name] for name in OUTCOMES)
    [recount] = view.rows(
        "select max(run_at) as newest, count(*) filter (is_latest and not is_repaired and rows_different > 0)::bigint as different "
        "from fct_reconciliation where event_hour::date between $first and $last"
    )
    rest: int = sum(abs(row["rest"]) for row in rows)
    return {
        "regions": rows,
        "rest": rest,
        "different": recount["different"],
        "recounted_at": recount["newest"],
        "balances": not rest and not recount["different"],
    }


def shares(row: Row) -> list[tuple[str, float, float]]:
    """The outcomes of a region as parts of a bar of width 100: name, start and width."""
    parts, start = [], 0.0
    for name in OUTCOMES:
        width = 100 * row[name] / row["offered"] if row["offered"] else 0.0
        parts.append((name, start, width))
        start += width
    return parts
