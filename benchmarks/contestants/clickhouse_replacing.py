"""Contestant f: ClickHouse as people use it, a ReplacingMergeTree ordered by event id. Runs in chDB's environment.

Inserts the JSON lines a batch at a time, then computes the totals per minute and dimension with FINAL, which leaves one row of
each id. No validation, no conflicts, no ledger: a resent event replaces the first one. Imports nothing of the project: its
interpreter has chDB and no more.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

COLUMNS = """
    event_id String, event_type LowCardinality(String), event_time DateTime64(6, 'UTC'), received_at DateTime64(6, 'UTC'),
    region LowCardinality(String), campaign_id LowCardinality(String), ad_id LowCardinality(String),
    store_id LowCardinality(String), user_id String, impression_id Nullable(String), placement LowCardinality(String),
    price_micros Int64, currency LowCardinality(String), user_agent LowCardinality(String)
"""
SETTINGS = {
    "max_threads": 2,
    "max_insert_threads": 2,
    "max_memory_usage": 3_000_000_000,
    "date_time_input_format": "best_effort",
    "input_format_skip_unknown_fields": 1,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--landing", type=Path, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--files-per-batch", type=int, required=True)
    args = parser.parse_args()

    from chdb.session import Session  # type: ignore[import-not-found,unused-ignore]

    files = sorted(args.landing.glob("events/*/*.jsonl"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    metrics = args.home / "minute_metrics.parquet"
    with Session(str(args.home / "clickhouse")) as db:
        for name, value in SETTINGS.items():
            db.query(f"SET {name} = '{value}'")
        db.query("CREATE DATABASE ads ENGINE = Atomic")
        db.query(f"CREATE TABLE ads.events ({COLUMNS}) ENGINE = ReplacingMergeTree ORDER BY event_id")
        columns = " ".join(COLUMNS.split()).replace("'", "''")
        for number, start in enumerate(range(0, len(files), args.files_per_batch)):
            started = time.perf_counter()
            names = ",".join(str(file.relative_to(args.landing)) for file in files[start : start + args.files_per_batch])
            db.query(f"INSERT INTO ads.events SELECT * FROM file('{args.landing}/{{{names}}}', JSONEachRow, '{columns}')")
            print(json.dumps({"batch_id": number, "seconds": round(time.perf_counter() - started, 3)}), flush=True)
        db.query(f"""
            INSERT INTO FUNCTION file('{metrics}', Parquet)
            SELECT
                toStartOfMinute(event_time) AS event_minute,
                region, campaign_id, ad_id, store_id, placement, currency,
                count() AS unique,
                countIf(event_type = 'impression') AS impressions,
                countIf(event_type = 'click') AS clicks,
                sum(price_micros) AS price_micros
            FROM ads.events FINAL GROUP BY ALL
        """)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
