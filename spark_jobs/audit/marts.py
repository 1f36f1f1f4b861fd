"""Compare the published marts with the table versions that they name. A mart may be older than the tables."""

from __future__ import annotations

from collections.abc import Collection

import duckdb

from spark_jobs.audit.compare import LEDGER_MEASURES, Difference
from spark_jobs.audit.compare_events import METRIC_MEASURES
from spark_jobs.audit.database import hour_in
from spark_jobs.config import Settings
from spark_jobs.lake.check import file_problem
from spark_jobs.lake.duck import literal
from spark_jobs.lake.lake import Lake, Snapshot
from spark_jobs.lake.marts import current_marts
from spark_jobs.lake.tables import BATCH_LEDGER, MINUTE_METRICS
from spark_jobs.units import HOUR_US, NO_HOUR, hour_moment

_GROUP = "near_real_time"
_COUNTS = tuple(name for name in LEDGER_MEASURES if name != "spend_nanos")


def compare_marts(settings: Settings, hours: Collection[int] | None) -> list[Difference]:
    """Return what differs in fct_campaign_minute (per hour and campaign) and fct_event_accounting (per hour). None: in all hours.

    Returns nothing if no marts are published; one difference without an hour if a version that they name has lost a file. Raises
    DuckDB's other errors as TableCorruptionError.
    """
    path = current_marts(settings).path
    if path is None:
        return []
    lake = Lake(settings)
    with lake.database() as database:
        database.execute(f"attach {literal(path)} as published (read_only)")
        versions = dict(
            database.execute(f"select table_name, delta_version from published.mart_build where mart_group = '{_GROUP}'").fetchall()
        )
        if not {BATCH_LEDGER.name, MINUTE_METRICS.name} <= versions.keys():
            return []
        snapshot = lake.at(versions)
        ledger, metrics = snapshot.scan(BATCH_LEDGER), snapshot.scan(MINUTE_METRICS)
        ended = f"semi join (from {ledger}) using (_query_id, _batch_id)"
        database.execute(f"create macro hour_of(t) as coalesce(epoch_us(t) // {HOUR_US}, {NO_HOUR})")  # marts keep times as UTC
        chosen = "true" if hours is None else hour_in(hours)
        known = {name for name, *_ in database.execute("describe published.fct_campaign_minute").fetchall()}
        measured = tuple(name for name in METRIC_MEASURES if name in known)  # an older adtally built fewer
        minute = f"hour_of(event_minute) as hour, campaign_id, {', '.join(measured)}"
        counted = f"hour_of(event_hour) as hour, null as campaign_id, {', '.join(_COUNTS)}"
        found = []
        for mart, columns, measures, rows, nanos, table in (
            ("fct_campaign_minute", minute, measured, " + ".join(METRIC_MEASURES[:4]), "spend_nanos", f"{metrics} {ended}"),
            ("fct_event_accounting", counted, _COUNTS, "offered", "0", f"{ledger} where stream = 'events'"),
        ):
            differ = " or ".join(f"sum(side * coalesce({m}, 0)) != 0" for m in measures)
            compared = f"""
                select hour, 'marts', 'mart_differs', campaign_id, greatest(1, abs(sum(side * ({rows}))))::bigint,
                    coalesce(sum({rows}) filter (side = 1), 0)::bigint, coalesce(sum({rows}) filter (side = -1), 0)::bigint,
                    coalesce(sum({nanos}) filter (side = 1), 0)::hugeint, coalesce(sum({nanos}) filter (side = -1), 0)::hugeint,
                    false, '{mart} does not say what the versions that it was built from hold'
                from (select 1 as side, {columns} from {table} union all select -1, {columns} from published.{mart})
                where {chosen} group by hour, campaign_id having {differ}
                """
            try:
                found += database.execute(compared).fetchall()
            except duckdb.Error:  # a file that is missing, cut or damaged each raises another kind
                if lost := _lost_files(snapshot):
                    return [lost]
                raise
    differences = [Difference(hour_moment(hour), *rest) for hour, *rest in found]
    return sorted(differences, key=lambda f: (f.hour, f.campaign_id or "", f.detail))


def _lost_files(snapshot: Snapshot) -> Difference | None:
    """Return the difference of marts that were built from files which are lost or damaged; None if no file is."""
    tables = BATCH_LEDGER, MINUTE_METRICS
    lost = [file for table in tables for file in snapshot.files(table) if file_problem(snapshot.lake, table, file)]
    if not lost:
        return None
    rows = sum(file.rows or 0 for file in lost)
    detail = f"{len(lost)} data files of the versions that the marts were built from are lost, as {lost[0].path}"
    return Difference(None, "marts", "mart_differs", None, max(1, rows), rows, 0, 0, 0, is_repaired=False, detail=detail)
