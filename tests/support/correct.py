"""What the tables of events and orders hold, batch by batch, however it was corrected; and hands that tamper with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import write_deltalake

from spark_jobs.audit.compare import LEDGER_MEASURES
from spark_jobs.audit.compare_events import METRIC_KEYS, METRIC_MEASURES
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.duck import connect_delta
from spark_jobs.lake.reading import open_table
from spark_jobs.lake.tables import TABLES

_BATCH = "_query_id, _batch_id"


def copied(home: Settings, target: Path) -> Settings:
    """A copy of a home, at another place, with the times of its files."""
    shutil.copytree(home.home_path, target)
    return load_settings(home=target)


def select(settings: Settings, sql: str) -> pa.Table:
    """Rows by SQL, in which each table of the registry stands under its name, as it is now."""
    with connect_delta(lakehouse=settings.lakehouse_uri) as lake:
        lake.execute("set timezone = 'UTC'")
        for name in TABLES:
            lake.execute(f"create view {name} as from delta_scan('{settings.table_uri(name)}')")
        return lake.execute(sql).to_arrow_table()


def rows(settings: Settings, sql: str) -> list[tuple[Any, ...]]:
    """The same as tuples, sorted."""
    return sorted((tuple(row.values()) for row in select(settings, sql).to_pylist()), key=repr)


def select_files(settings: Settings, name: str) -> list[Path]:
    """The data files of a table."""
    held = open_table(settings.table_uri(name))
    return [Path(uri.removeprefix("file://")) for uri in held.file_uris()]


def append(settings: Settings, name: str, sql: str) -> None:
    """Add the rows of a query to a table, as a hand would."""
    table = TABLES[name]
    write_deltalake(
        open_table(settings.table_uri(name)), select(settings, sql).select(table.schema.names).cast(table.schema), mode="append"
    )


def delete(settings: Settings, name: str, where: str) -> None:
    """Delete rows, as a hand would; at least one has to go."""
    assert open_table(settings.table_uri(name)).delete(where)["num_deleted_rows"] > 0


def update(settings: Settings, name: str, where: str, **values: str) -> None:
    """Change rows, as a hand would; at least one has to be there."""
    assert open_table(settings.table_uri(name)).update(updates=values, predicate=where)["num_updated_rows"] > 0


def contents(settings: Settings, *, identity: bool = True) -> dict[str, Any]:
    """All rows of events, orders and rejects, and what increments and ledger sum up to per batch; without ``identity`` over all."""
    batch = f", {_BATCH}" if identity else ""
    marks = "_run_id" if identity else f"_run_id, {_BATCH}, ingested_at, ingested_date"
    of_events = marks.replace(", ingested_date", "")
    minutes = f"event_minute, {', '.join(METRIC_KEYS)}{batch}"
    sums = ", ".join(f"sum({name})::bigint as {name}" for name in METRIC_MEASURES)
    counted = "sum(impressions + clicks + invalid_impressions + invalid_clicks)"
    cells = f"stream, source, region, event_hour{batch}"
    counts = ", ".join(f"sum({name})::bigint as {name}" for name in LEDGER_MEASURES)
    return {
        "events": rows(settings, f"select * exclude ({of_events}) from events"),
        "rejected_events": rows(settings, f"select * exclude ({marks}) from rejected_events"),
        "orders": rows(settings, f"select * exclude ({of_events}) from orders"),
        "rejected_orders": rows(settings, f"select * exclude ({marks}) from rejected_orders"),
        "minute_metrics": rows(
            settings,
            f"select {minutes}, {sums} from minute_metrics group by all having {counted} != 0",
        ),
        "record_uuids_twice": rows(settings, "select record_uuid from minute_metrics group by all having count(*) > 1"),
        "batch_ledger": rows(settings, f"select {cells}, {counts} from batch_ledger group by all having sum(offered) != 0"),
    }
