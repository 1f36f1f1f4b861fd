"""A small lakehouse whose tables agree with each other, made with SQL, to be broken with SQL."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
from deltalake import write_deltalake

from expectations import HourValidation, validate_hour
from spark_jobs.lake.duck import delta_cursor
from spark_jobs.lake.tables import BATCH_LEDGER, CAMPAIGNS, EVENTS, MINUTE_METRICS, ORDERS, Table

HOUR = datetime(2025, 6, 2, 10, tzinfo=UTC)
NEXT_HOUR = datetime(2025, 6, 2, 11, tzinfo=UTC)
EMPTY_HOUR = datetime(2025, 6, 2, 15, tzinfo=UTC)
TABLES = (EVENTS, ORDERS, MINUTE_METRICS, BATCH_LEDGER, CAMPAIGNS)
_KINDS = {"STRING": "VARCHAR", "TIMESTAMP": "TIMESTAMPTZ", "ARRAY<STRING>": "VARCHAR[]"}

_CLEAN = """
insert into campaigns by name
select 'c-' || model as campaign_id, 's-1' as store_id, model as billing_model, 'EUR' as currency
from (values ('cpm'), ('cpc')) as models(model);

insert into events by name
select 'e-' || n as event_id, if(n % 3 = 0, 'click', 'impression') as event_type, moment as event_time,
    moment + interval 2 seconds as received_at, if(n % 2 = 0, 'eu', 'us') as region, if(n % 4 < 2, 'c-cpm', 'c-cpc') as campaign_id,
    'a-' || n % 3 as ad_id, 's-1' as store_id, 'u-' || n as user_id, 1500 as price_micros, 'EUR' as currency,
    billing_model, case when billing_model = 'cpm' and event_type = 'impression' then 1500
        when billing_model = 'cpc' and event_type = 'click' then 1500000 else 0 end as spend_nanos,
    false as is_late, n as fingerprint, 'events/eu/1.jsonl' as source_file, n + 1 as source_line,
    timestamptz '2025-06-02 12:00:00Z' as ingested_at, moment::date as event_date, hour(moment) as event_hour,
    'q-1' as _query_id, n % 2 as _batch_id
from (select unnest(range(24)) as n, timestamptz '2025-06-02 10:00:00Z' + interval 5 minutes * n as moment),
    lateral (select if(n % 4 < 2, 'cpm', 'cpc') as billing_model),
    lateral (select if(n % 3 = 0, 'click', 'impression') as event_type);

insert into minute_metrics by name
select uuid()::varchar as record_uuid, time_bucket(interval 1 minute, event_time) as event_minute, region, campaign_id, ad_id,
    store_id, currency, count(*) filter (event_type = 'impression') as impressions,
    count(*) filter (event_type = 'click') as clicks, 0 as invalid_impressions, 0 as invalid_clicks,
    sum(spend_nanos)::bigint as spend_nanos, event_date, _query_id, _batch_id
from events group by all;

insert into batch_ledger by name
select 'events' as stream, 'files' as source, region, date_trunc('hour', event_time) as event_hour,
    count(*) + 2 as offered, count(*) as accepted, 1 as duplicate, 0 as conflict, 1 as rejected, 0 as late, 0 as invalid_traffic,
    0 as unpriced, sum(spend_nanos)::bigint as spend_nanos, max(received_at) as max_received_at, max(ingested_at) as ingested_at,
    _query_id, _batch_id
from events group by all;

insert into orders by name
select 'o-' || n as order_id, timestamptz '2025-06-02 10:00:00Z' + interval 10 minutes * n as order_time,
    order_time + interval 1 second as received_at, 'eu' as region, 'u-1' as user_id, 's-1' as store_id, 1000 as total_micros,
    'EUR' as currency, if(n = 1, 'cancelled', 'placed') as status, if(n = 1, received_at, null) as cancelled_at, true as has_placed,
    false as is_late, n as fingerprint, 'orders/eu/1.jsonl' as source_file, n + 1 as source_line,
    timestamptz '2025-06-02 12:00:00Z' as ingested_at, 'q-2' as _query_id, 0 as _batch_id
from (select unnest(range(3)) as n);
"""


def validated(table: str, uri: str, version: int | None, hour: datetime, **options: Any) -> HourValidation:
    """Validate an hour with a DuckDB of this process."""
    with delta_cursor("") as cursor:
        return validate_hour(cursor, table, uri, version, hour, **options)


class Lake:
    """Tables under ``root``: ``sql`` changes them in memory, ``write`` makes Delta tables of those that it changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._connection = duckdb.connect()
        self._connection.execute("set timezone = 'UTC'")
        for table in TABLES:
            self._connection.execute(f"create table {table.name} ({_columns(table)})")
        self._connection.execute(_CLEAN)

    def sql(self, statements: Iterable[str]) -> None:
        for statement in statements:
            self._connection.execute(statement)

    def write(self) -> None:
        for table in TABLES:
            rows = self._connection.execute(f"select * from {table.name}").to_arrow_table()
            write_deltalake(
                self.uri(table.name), rows, mode="overwrite", partition_by=list(table.partition_by), schema_mode="overwrite"
            )

    def uri(self, table: str) -> str:
        return str(self.root / table)

    def related(self, *names: str) -> dict[str, tuple[str, int | None]]:
        return {name: (self.uri(name), None) for name in names or ("batch_ledger", "campaigns")}


def _columns(table: Table) -> str:
    return ", ".join(f"{name} {_KINDS.get(kind, kind)}" for name, kind in table.types.items())
