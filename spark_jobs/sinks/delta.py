"""Idempotent Delta writes. Nothing else in the package writes a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import StructType

from spark_jobs.config import Settings
from spark_jobs.delta_log import DeltaLog
from spark_jobs.steps import Step, durable
from spark_jobs.tables import TABLES, Table


@dataclass(frozen=True)
class Transaction:
    """A write's identity: the streaming query's id (it lives in the checkpoint) and the batch id.

    Delta skips a write whose version it has already seen for the id. So a batch that runs again writes nothing twice, and a
    fresh checkpoint, having a fresh id, is never skipped.
    """

    query_id: str
    batch_id: int


def ensure_tables(spark: SparkSession, settings: Settings) -> None:
    """Create the tables that do not exist yet. Safe to run again and again."""

    def create(table: Table) -> None:
        uri = settings.table_uri(table.name)
        if DeltaLog(uri, spark).exists():
            return
        builder = (
            DeltaTable.createIfNotExists(spark)
            .location(uri)
            .comment(table.grain)
            .addColumns(table_schema(table))
            .property("delta.dataSkippingStatsColumns", ",".join(table.stats_columns))
        )
        if table.partition_by:
            builder = builder.partitionedBy(*table.partition_by)
        builder.execute()

    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(create, TABLES.values()))


def table_schema(table: Table) -> StructType:
    """The Spark schema of a table of the registry."""
    return cast(StructType, StructType.fromDDL(table.columns))


def conform(frame: DataFrame, table: Table) -> DataFrame:
    """Exactly the table's columns, in its order; a missing one is an error."""
    return frame.select(*table_schema(table).names)


def append(
    frame: DataFrame,
    table: Table,
    settings: Settings,
    step: Step,
    transaction: Transaction,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Append once per transaction. ``metadata`` goes into the commit as JSON (userMetadata)."""
    writer = (
        conform(frame, table)
        .write.format("delta")
        .mode("append")
        .option("txnAppId", transaction.query_id)
        .option("txnVersion", transaction.batch_id)
    )
    if metadata is not None:
        writer = writer.option("userMetadata", json.dumps(metadata))
    with durable(step, transaction.batch_id):
        writer.save(settings.table_uri(table.name))


def merge_orders(
    frame: DataFrame, table: Table, settings: Settings, transaction: Transaction, metadata: Mapping[str, object]
) -> None:
    """Insert new orders and replace known ones by order_id, once per transaction.

    Sets Delta's transaction in the frame's own session (each streaming query has one), for MERGE takes no options.
    """
    spark = frame.sparkSession
    conf = {
        "spark.databricks.delta.write.txnAppId": transaction.query_id,
        "spark.databricks.delta.write.txnVersion": str(transaction.batch_id),
        "spark.databricks.delta.commitInfo.userMetadata": json.dumps(metadata),
    }
    for key, value in conf.items():
        spark.conf.set(key, value)
    try:
        with durable(Step.ORDERS, transaction.batch_id):
            (
                DeltaTable.forPath(spark, settings.table_uri(table.name))
                .alias("known")
                .merge(conform(frame, table).alias("new"), "known.order_id = new.order_id")
                .whenMatchedUpdateAll()
                .whenNotMatchedInsertAll()
                .execute()
            )
    finally:
        for key in conf:
            spark.conf.unset(key)


def replace_all(frame: DataFrame, table: Table, settings: Settings, step: Step, metadata: Mapping[str, object]) -> None:
    """Replace the whole content in one commit."""
    with durable(step):
        (
            conform(frame, table)
            .write.format("delta")
            .mode("overwrite")
            .option("userMetadata", json.dumps(metadata))
            .save(settings.table_uri(table.name))
        )
