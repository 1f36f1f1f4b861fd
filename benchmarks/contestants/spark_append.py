"""Contestants a and b: Structured Streaming from the landing files to a Delta table, nothing else.

a: read and append. b (``--dedupe``): the same with Spark's own dropDuplicatesWithinWatermark on RocksDB state.
Prints one JSON line per micro-batch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pyspark.sql import SparkSession

from spark_jobs.config import load_settings
from spark_jobs.jars import ensure_jars

SCHEMA = """
    event_id STRING, event_type STRING, event_time TIMESTAMP, received_at TIMESTAMP, region STRING, campaign_id STRING,
    ad_id STRING, store_id STRING, user_id STRING, impression_id STRING, placement STRING, price_micros BIGINT,
    currency STRING, user_agent STRING
"""
# Resends may be as old as the input is long: a shorter watermark would forget ids that still come again.
WATERMARK = "30 days"


def session(driver_memory: str) -> SparkSession:
    """Two cores and two partitions, as the project is run in the comparison."""
    conf = {
        "spark.jars": ",".join(map(str, ensure_jars(load_settings()))),
        "spark.ui.enabled": "false",
        "spark.driver.memory": driver_memory,
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.shuffle.partitions": "2",
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.databricks.delta.snapshotPartitions": "2",
        "spark.sql.streaming.numRecentProgressUpdates": "1000",
        "spark.sql.streaming.stateStore.providerClass": (
            "org.apache.spark.sql.execution.streaming.state.RocksDBStateStoreProvider"
        ),
        "spark.sql.streaming.stateStore.rocksdb.changelogCheckpointing.enabled": "true",
    }
    builder = SparkSession.builder.master("local[2]").appName("benchmark")
    for name, value in conf.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--landing", type=Path, required=True)
    parser.add_argument("--home", type=Path, required=True, help="where the table and the checkpoint go")
    parser.add_argument("--files-per-batch", type=int, required=True)
    parser.add_argument("--driver-memory", default="2g")
    parser.add_argument("--dedupe", action="store_true")
    args = parser.parse_args(argv)
    spark = session(args.driver_memory)
    frame = (
        spark.readStream.schema(SCHEMA)
        .option("maxFilesPerTrigger", args.files_per_batch)
        .option("maxFileAge", "3650d")
        .json(f"{args.landing}/events/*")
    )
    if args.dedupe:
        frame = frame.withWatermark("event_time", WATERMARK).dropDuplicatesWithinWatermark(["event_id"])
    query = (
        frame.writeStream.format("delta")
        .option("checkpointLocation", str(args.home / "checkpoint"))
        .trigger(availableNow=True)
        .start(str(args.home / "events"))
    )
    query.awaitTermination()
    for progress in query.recentProgress:
        if progress["numInputRows"]:
            seconds = progress["durationMs"]["triggerExecution"] / 1000
            line = {"batch_id": progress["batchId"], "offered": progress["numInputRows"], "seconds": seconds}
            print(json.dumps(line))
    spark.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
