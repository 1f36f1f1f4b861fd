"""Operations: what is open and why, how far behind each source is, what runs, how big the tables are, and the health signals."""

from __future__ import annotations

from datetime import UTC
from typing import Any

from orchestration.console.tables import Column, DataTable, Row
from orchestration.console.view import Page, View
from orchestration.up.graphql import Webserver, WebserverError
from spark_jobs.errors import AdtallyError
from spark_jobs.failure import one_line
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import TABLES
from spark_jobs.operate.health import SIGNALS, read_signal
from spark_jobs.operate.watermark import Closing
from spark_jobs.units import HOUR

_RUNS = "{ runsOrError(limit: 25) { __typename ... on Runs { results { runId jobName status startTime endTime } } } }"
_ASK_SECONDS = 2.0
_HOURS = 24


def build(view: View) -> dict[str, Any]:
    """The closing of hours, the signals, and the runs."""
    closing = view.closing
    runs, problem = _runs(view)
    return {
        "closing": closing,
        "holds_open": _holds_open(closing),
        "signals": [read_signal(view.settings, name) for name in SIGNALS],
        "runs": runs,
        "runs_problem": problem,
    }


def sources(view: View) -> DataTable:
    """The progress of each source, and whether it holds hours open."""
    closing = view.closing
    held = _holds_open(closing)
    rows: list[Row] = []
    for each in closing.sources:
        lag = None if each.progress_at is None else (view.now - each.progress_at.replace(tzinfo=None)).total_seconds()
        state = "retired" if each.is_retired else "silent" if each.is_silent else "awaited" if each.is_awaited else "sends"
        row = {"source": each.name, "kind": each.source, "state": state, "progress_at": each.progress_at, "lag_seconds": lag}
        rows.append(row | {"last_ingested_at": each.last_ingested_at, "holds_open": each.name in held})
    columns = (
        Column("source", "source"),
        Column("kind", "kind"),
        Column("state", "state"),
        Column("progress_at", "newest receipt (UTC)", "time"),
        Column("lag_seconds", "behind", "seconds"),
        Column("last_ingested_at", "last ingested (UTC)", "time"),
        Column("holds_open", "holds hours open", "flag", help="no hour closes before this source has passed it"),
    )
    return DataTable("sources", "Sources", columns, rows, empty="Nothing was ingested yet: run `adtally ingest`.")


def hours(view: View) -> DataTable:
    """The newest hours with data, whether each is closed, and which sources an open hour waits for."""
    closing = view.closing
    found = view.rows(
        "select event_hour, sum(accepted)::bigint as accepted, sum(offered)::bigint as offered from fct_event_accounting "
        f"where event_hour is not null and accepted > 0 group by event_hour order by event_hour desc limit {_HOURS}"
    )
    for row in found:
        end = row["event_hour"].replace(tzinfo=UTC) + HOUR
        row["state"] = "closed" if closing.is_closed(end - HOUR) else "open"
        waited = [each for each in closing.sources if not each.is_retired and (each.progress_at is not None or each.is_awaited)]
        behind = [each.name for each in waited if each.progress_at is None or each.progress_at < end + view.settings.hour_grace]
        row["held_by"] = "" if row["state"] == "closed" else ", ".join(sorted(behind))
    columns = (
        Column("event_hour", "hour (UTC)", "time"),
        Column("state", "state"),
        Column("held_by", "held open by", help="sources that have not sent anything from after the hour's end and the grace"),
        Column("offered", "offered", "count"),
        Column("accepted", "accepted", "count"),
    )
    return DataTable("hours", f"Newest {_HOURS} hours with data", columns, found, empty="There is no hour with data yet.")


def sizes(view: View) -> DataTable:
    """The Delta tables: version, files and bytes."""
    snapshot = Lake(view.settings).pin(*TABLES.values())
    rows: list[Row] = []
    for table in TABLES.values():
        if table in snapshot:
            files = snapshot.files(table)
            size = sum(file.size for file in files)
            rows.append({"table": table.name, "version": snapshot.version(table), "files": len(files), "size": size})
    columns = (
        Column("table", "table"),
        Column("version", "version", "count"),
        Column("files", "files", "count"),
        Column("size", "size", "bytes"),
    )
    return DataTable("tables", "Tables of the lakehouse", columns, rows, empty="There are no tables yet: run `adtally ingest`.")


def _holds_open(closing: Closing) -> set[str]:
    """The sources with the least progress: the next hour closes only when they have passed it."""
    waited = [each for each in closing.sources if not each.is_retired and (each.progress_at is not None or each.is_awaited)]
    if any(each.progress_at is None for each in waited):
        return {each.name for each in waited if each.progress_at is None}
    least = min((each.progress_at for each in waited if each.progress_at is not None), default=None)
    return {each.name for each in waited if each.progress_at == least}


def _runs(view: View) -> tuple[list[Row], str]:
    """The newest runs of Dagster, those in progress first; a problem where the UI cannot be asked."""
    address = view.settings.webserver_url
    if not address:
        return [], "Dagster does not run with this console: `adtally up` starts both."
    try:
        answer = Webserver(address, token=view.settings.webserver_token, timeout=_ASK_SECONDS).ask(_RUNS)
        found: list[Row] = answer["runsOrError"].get("results", [])
    except (WebserverError, AdtallyError) as error:
        return [], f"Dagster at {address} does not answer: {one_line(error)}"
    return sorted(found, key=lambda run: run["endTime"] is not None), ""


PAGE = Page("operations", "/operations", "Operations", build, {"sources": sources, "hours": hours, "tables": sizes}, (), seconds=5)
