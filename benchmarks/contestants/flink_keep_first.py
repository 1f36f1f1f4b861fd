"""Contestant d: Flink SQL, keep the first row of each event_id by processing time. Runs in the Flink environment.

JSON lines in, Parquet out, checkpoints every 10 s, parallelism 2, mini-batch off. Writes events only. Imports nothing
of the project: its interpreter has PyFlink and no more.
"""

from __future__ import annotations

import argparse
import json
import time

COLUMNS = """
    event_id STRING, event_type STRING, event_time TIMESTAMP_LTZ(6), received_at TIMESTAMP_LTZ(6), region STRING,
    campaign_id STRING, ad_id STRING, store_id STRING, user_id STRING, impression_id STRING, placement STRING,
    price_micros BIGINT, currency STRING, user_agent STRING
"""
NAMES = ", ".join(part.split()[0] for part in COLUMNS.replace("\n", " ").split(",") if part.strip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--landing", required=True)
    parser.add_argument("--home", required=True)
    parser.add_argument("--state", choices=("hashmap", "rocksdb"), required=True)
    args = parser.parse_args()

    from pyflink.common import Configuration  # type: ignore[import-not-found,unused-ignore]
    from pyflink.table import EnvironmentSettings, TableEnvironment  # type: ignore[import-not-found,unused-ignore]

    conf = Configuration()
    for name, value in {
        "parallelism.default": "2",
        "state.backend.type": args.state,
        "execution.checkpointing.interval": "10 s",
        "execution.checkpointing.storage": "filesystem",
        "execution.checkpointing.dir": f"file://{args.home}/checkpoints",
        "execution.checkpointing.incremental": "true",
        "taskmanager.memory.managed.size": "1g",
        "table.exec.mini-batch.enabled": "false",
        "table.local-time-zone": "UTC",
        "rest.bind-address": "127.0.0.1",
        "rest.bind-port": "0",
    }.items():
        conf.set_string(name, value)
    env = TableEnvironment.create(EnvironmentSettings.new_instance().in_streaming_mode().with_configuration(conf).build())
    env.execute_sql(f"""
        CREATE TABLE landing ({COLUMNS}, proctime AS PROCTIME()) WITH (
            'connector' = 'filesystem', 'path' = 'file://{args.landing}/events', 'format' = 'json',
            'json.timestamp-format.standard' = 'ISO-8601'
        )
    """)
    env.execute_sql(f"""
        CREATE TABLE events ({COLUMNS}) WITH (
            'connector' = 'filesystem', 'path' = 'file://{args.home}/events', 'format' = 'parquet'
        )
    """)
    started = time.perf_counter()
    env.execute_sql(f"""
        INSERT INTO events SELECT {NAMES} FROM (
            SELECT *, ROW_NUMBER() OVER (PARTITION BY event_id ORDER BY proctime ASC) AS occurrence FROM landing
        ) WHERE occurrence = 1
    """).wait()
    print(json.dumps({"batch_id": 0, "seconds": round(time.perf_counter() - started, 3)}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
