"""Ingest: landing files into Delta, each record once.

Spark's file source lists the files and keeps offsets in the checkpoint; a batch is the list of its files. Its tasks read the
bytes themselves (see ``staging``), for a record's place and its faults must be known to the byte. Per batch, in this order:
parse and stage; classify on the driver by narrow keys; append events; rejected and conflicting records; increments; the ledger.
"""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from filelock import FileLock, Timeout
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.streaming.query import StreamingQuery

from spark_jobs.config import Settings
from spark_jobs.contract.spec import Limits, to_micros
from spark_jobs.dedupe.classify import Classification, Outcome, classify
from spark_jobs.dedupe.index import KeyIndex
from spark_jobs.dedupe.keys import Keys, hex_fingerprint, keys_of_ids
from spark_jobs.delta_log import Commit, DeltaLog
from spark_jobs.errors import AdtallyError, BusyError, ConservationError
from spark_jobs.jobs.campaigns import campaigns_at, load_campaigns
from spark_jobs.session import build_session
from spark_jobs.sinks.delta import Transaction, append, ensure_tables, merge_orders, table_schema
from spark_jobs.sources.checkpoint import read_batch_files
from spark_jobs.sources.landing import LandingFile, local_path, plan_splits
from spark_jobs.staging import NO_HOUR, StagedSplit, StageTask, raw_lines, stage_split, staged
from spark_jobs.steps import Step, crash_point, durable, watch_checkpoint
from spark_jobs.tables import (
    BATCH_LEDGER,
    EVENTS,
    MINUTE_METRICS,
    ORDERS,
    REJECTED_EVENTS,
    REJECTED_ORDERS,
    Table,
)
from spark_jobs.transforms.events import CAMPAIGN_SCHEMA, METRIC_KEYS, METRIC_MEASURES, event_columns, increments
from spark_jobs.transforms.orders import settle_orders

_FILE_SCHEMA = "path STRING, modificationTime TIMESTAMP, length BIGINT, content BINARY"
_ROWS_PER_WRITER = 250_000
_BATCH_OF_ROWS = 20_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_REJECT_DDL = (
    "outcome STRING, reason_codes ARRAY<STRING>, region STRING, source_file STRING, source_line BIGINT, raw STRING, "
    "raw_encoding STRING, raw_size_bytes BIGINT, record_id STRING, record_time TIMESTAMP, fingerprint STRING, "
    "accepted_fingerprint STRING"
)
_INCREMENT_DDL = (
    "event_minute_us BIGINT, region STRING, campaign_id STRING, ad_id STRING, store_id STRING, placement STRING, "
    "currency STRING, impressions BIGINT, clicks BIGINT, invalid_impressions BIGINT, invalid_clicks BIGINT, spend_nanos BIGINT"
)


@dataclass(frozen=True)
class BatchReport:
    """What one batch did: counts of records, and the seconds that it took."""

    stream: str
    query_id: str
    batch_id: int
    offered: int
    accepted: int
    duplicate: int
    conflict: int
    rejected: int
    late: int
    seconds: float


@dataclass(frozen=True)
class IngestReport:
    """The sums over the batches of a run."""

    batches: int = 0
    offered: int = 0
    accepted: int = 0
    duplicate: int = 0
    conflict: int = 0
    rejected: int = 0
    late: int = 0

    def plus(self, batch: BatchReport) -> IngestReport:
        """These sums and one more batch."""
        counted = {name: getattr(self, name) + getattr(batch, name) for name in _COUNTS}
        return IngestReport(batches=self.batches + 1, **counted)


_COUNTS = ("offered", "accepted", "duplicate", "conflict", "rejected", "late")


@dataclass(frozen=True)
class Plan:
    """What a batch is decided with. Stored in the commit of its first table: a batch that runs again is decided the same."""

    limits: Limits
    campaigns_version: int
    files: list[LandingFile]

    def to_metadata(self, transaction: Transaction) -> dict[str, object]:
        """The plan as it is stored in a commit."""
        return {
            "query_id": transaction.query_id,
            "batch_id": transaction.batch_id,
            "limits": asdict(self.limits),
            "campaigns_version": self.campaigns_version,
            "files": [[file.modified_ms, file.path, file.size] for file in self.files],
        }

    @classmethod
    def from_commit(cls, commit: Commit) -> Plan:
        """The inverse of ``to_metadata``."""
        stored = json.loads(commit.user_metadata or "{}")
        return cls(
            Limits(**stored["limits"]),
            int(stored["campaigns_version"]),
            [LandingFile(*file) for file in stored["files"]],
        )


@dataclass(frozen=True)
class SplitRows:
    """Work of a writing task: a staged split, the number of its first line, and what became of its rows."""

    task: StageTask
    first_line: int
    dropped: npt.NDArray[np.int64]  # row numbers of duplicates and conflicts
    conflicts: npt.NDArray[np.int64]  # row numbers of conflicts
    accepted_fingerprints: npt.NDArray[np.uint64]  # of the conflicts


@dataclass
class Batch:
    """A parsed batch on the driver."""

    plan: Plan
    transaction: Transaction
    tasks: list[StageTask]
    splits: list[StagedSplit]
    keys: Keys

    @property
    def row_counts(self) -> list[int]:
        """Valid rows of each split."""
        return [len(s.hours) // 4 for s in self.splits]

    def column(self, name: str, kind: type[Any]) -> npt.NDArray[Any]:
        """A byte column of the splits as one array."""
        parts = [np.frombuffer(getattr(s, name), dtype=kind) for s in self.splits]
        return np.concatenate(parts) if parts else np.empty(0, dtype=kind)

    @property
    def first_lines(self) -> list[int]:
        """The number (from 1) of the first line of each split within its file."""
        lines, before = [], 0
        for task, split in zip(self.tasks, self.splits, strict=True):
            before = 1 if task.split.start == 0 else before
            lines.append(before)
            before += split.offered
        return lines


def _tasks_of(batch: Iterator[Any]) -> Iterator[Any]:
    for part in batch:
        for value in part.column(0).to_pylist():
            yield pickle.loads(value)


class StreamJob(ABC):
    """One stream: its query, and what a batch of it does. Sub-classes say where the accepted records go."""

    stream: str
    accepted_table: Table
    rejected_table: Table
    rejected_step: Step
    ledger_step: Step

    def __init__(self, settings: Settings, report: Callable[[BatchReport], None]) -> None:
        self.settings = settings
        self.report = report
        self.checkpoint = settings.checkpoints_path / self.stream
        self._lock = FileLock(settings.home_path / f".{self.stream}.write.lock")
        self._first = True
        self._price_list: tuple[int, pa.Table] | None = None

    def start(self, spark: SparkSession, *, continuous: bool, trigger_seconds: float) -> StreamingQuery:
        """Start the streaming query: all that is there, or until stopped."""
        folder = self.settings.landing_path / self.stream
        folder.mkdir(parents=True, exist_ok=True)
        reader = (
            spark.readStream.format("binaryFile")
            .schema(_FILE_SCHEMA)
            .option("pathGlobFilter", "*.jsonl*")
            .option("maxFileAge", "36500d")
        )
        if self.settings.max_files_per_batch:
            reader = reader.option("maxFilesPerTrigger", self.settings.max_files_per_batch)
        else:
            reader = reader.option("maxBytesPerTrigger", self.settings.max_bytes_per_batch)
        files = reader.load(f"{_escape_glob(str(folder))}/*").select("path")
        writer = files.writeStream.queryName(self.stream).foreachBatch(self._run).option("checkpointLocation", str(self.checkpoint))
        if continuous:
            writer = writer.trigger(processingTime=f"{int(trigger_seconds * 1000)} milliseconds")
        else:
            writer = writer.trigger(availableNow=True)
        watch_checkpoint(self.checkpoint)
        return writer.start()

    @abstractmethod
    def write_accepted(self, spark: SparkSession, batch: Batch, history_version: int, classified: Classification) -> int:
        """Write the accepted records with the batch's plan; returns how many were."""

    def write_derived(self, spark: SparkSession, batch: Batch, classified: Classification) -> None:
        """Write what follows from the accepted records. Nothing, unless a stream says otherwise."""
        return

    @abstractmethod
    def classify(self, spark: SparkSession, batch: Batch, history_version: int) -> Classification:
        """Tell new records from resent ones, against the accepted table at ``history_version``."""

    def _run(self, frame: DataFrame, batch_id: int) -> None:
        spark = frame.sparkSession
        started = time.monotonic()
        crash_point("after", Step.OFFSETS, batch_id)  # Spark wrote them just before
        query_id = json.loads((self.checkpoint / "metadata").read_text("utf-8"))["id"]
        transaction = Transaction(query_id, batch_id)
        with self._lock:
            report = self._batch(spark, transaction, started)
        self._first = False
        self.report(report)
        crash_point("before", Step.COMMITS, batch_id)  # Spark writes it right after

    def _batch(self, spark: SparkSession, transaction: Transaction, started: float) -> BatchReport:
        log = DeltaLog(self.settings.table_uri(self.accepted_table.name), spark)
        done = log.find_transaction(transaction.query_id, transaction.batch_id) if self._first else None
        plan = Plan.from_commit(done) if done else self._plan(spark, transaction)
        # the classification of a batch never sees the batch's own rows
        history_version = done.version - 1 if done else log.latest_version() or 0
        scratch = self.settings.scratch_path / f"{self.stream}-{transaction.query_id}-{transaction.batch_id}"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            batch = self._parse(spark, plan, transaction, scratch)
            classified = self.classify(spark, batch, history_version)
            accepted = self.write_accepted(spark, batch, history_version, classified)
            # the plan now stands in a commit; what follows may go side by side, the ledger last
            with ThreadPoolExecutor(max_workers=2) as pool:
                for done_write in [
                    pool.submit(self._write_rejects, spark, batch, classified),
                    pool.submit(self.write_derived, spark, batch, classified),
                ]:
                    done_write.result()
            return self._write_ledger(spark, batch, classified, accepted, started)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _plan(self, spark: SparkSession, transaction: Transaction) -> Plan:
        planned = read_batch_files(self.checkpoint, transaction.batch_id)
        settings = self.settings
        version = load_campaigns(spark, settings) if self.stream == "events" else 0
        limits = Limits(
            ingested_us=planned.planned_us,
            earliest_us=to_micros(settings.earliest_event_time),
            future_skew_us=settings.future_skew // timedelta(microseconds=1),
            hour_grace_us=settings.hour_grace // timedelta(microseconds=1),
        )
        return Plan(limits, version or 0, planned.files)

    def _parse(self, spark: SparkSession, plan: Plan, transaction: Transaction, scratch: Path) -> Batch:
        splits = plan_splits(plan.files, self.settings.landing_path, self.settings.split_bytes)
        tasks = [StageTask(self.stream, split, plan.limits, str(scratch)) for split in splits]
        campaigns = self._campaigns(spark, plan)
        context = spark.sparkContext
        slices = max(1, min(len(tasks), context.defaultParallelism * 16))
        results = context.parallelize(tasks, slices).map(lambda task: stage_split(task, campaigns)).collect()
        return Batch(plan, transaction, tasks, results, Keys.concatenate([Keys.from_bytes(s.keys) for s in results]))

    def _campaigns(self, spark: SparkSession, plan: Plan) -> pa.Table:
        if self.stream != "events":
            return CAMPAIGN_SCHEMA.empty_table()
        if self._price_list is None or self._price_list[0] != plan.campaigns_version:
            self._price_list = (plan.campaigns_version, campaigns_at(spark, self.settings, plan.campaigns_version))
        return self._price_list[1]

    def split_rows(self, batch: Batch, classified: Classification) -> list[SplitRows]:
        """The batch's outcome, cut into its splits."""
        made, start = [], 0
        for task, first_line, count in zip(batch.tasks, batch.first_lines, batch.row_counts, strict=True):
            outcome = classified.outcome[start : start + count]
            conflicts = np.flatnonzero(outcome == Outcome.CONFLICT)
            fingerprints = classified.accepted_fingerprint[start : start + count][conflicts]
            made.append(SplitRows(task, first_line, np.flatnonzero(outcome), conflicts, fingerprints))
            start += count
        return made

    def work_frame(self, spark: SparkSession, work: list[SplitRows], rows: int) -> DataFrame:
        """A frame with one pickled SplitRows a row, in as many partitions as files are worth writing."""
        writers = max(1, min(spark.sparkContext.defaultParallelism, -(-rows // _ROWS_PER_WRITER), len(work)))
        data = spark.sparkContext.parallelize([(bytearray(pickle.dumps(w)),) for w in work], writers)
        return spark.createDataFrame(data, "work BINARY")

    def _write_rejects(self, spark: SparkSession, batch: Batch, classified: Classification) -> None:
        work = [
            w
            for w, split in zip(self.split_rows(batch, classified), batch.splits, strict=True)
            if len(w.conflicts) or split.reject_hours
        ]
        if not work:
            return
        campaigns = self._campaigns(spark, batch.plan)

        def rejects(parts: Iterator[Any]) -> Iterator[Any]:
            for split in _tasks_of(parts):
                yield from reject_rows(split, campaigns).to_batches(max_chunksize=2_000)

        frame = self._stamp(self.work_frame(spark, work, 0).mapInArrow(rejects, _REJECT_DDL), batch)
        frame = (
            frame.withColumn("source", F.lit("files"))
            .withColumn("source_topic", F.lit(None).cast("string"))
            .withColumn("source_partition", F.lit(None).cast("int"))
            .withColumn("source_offset", F.lit(None).cast("bigint"))
            .withColumn("ingested_date", F.to_date("ingested_at"))
        )
        append(frame, self.rejected_table, self.settings, self.rejected_step, batch.transaction)

    def _stamp(self, frame: DataFrame, batch: Batch) -> DataFrame:
        return (
            frame.withColumn("ingested_at", F.timestamp_micros(F.lit(batch.plan.limits.ingested_us)))
            .withColumn("_query_id", F.lit(batch.transaction.query_id))
            .withColumn("_batch_id", F.lit(batch.transaction.batch_id).cast("bigint"))
        )

    def _write_ledger(
        self, spark: SparkSession, batch: Batch, classified: Classification, accepted: int, started: float
    ) -> BatchReport:
        rows = ledger_rows(batch, classified, self.stream)
        totals = {name: sum(row[name] for row in rows) for name in _COUNTS}
        lines = sum(split.offered for split in batch.splits)
        parts = totals["accepted"] + totals["duplicate"] + totals["conflict"] + totals["rejected"]
        if not lines == totals["offered"] == parts or accepted != totals["accepted"]:
            raise ConservationError(
                f"batch {batch.transaction.batch_id} of {self.stream}: {lines} lines offered, {parts} accounted for, "
                f"{totals['accepted']} accepted but {accepted} written",
                hint="nothing of it is in the ledger; docs/runbooks/conservation-broken.md",
            )
        schema = table_schema(BATCH_LEDGER)
        stamped = [{**row, "_query_id": batch.transaction.query_id, "_batch_id": batch.transaction.batch_id} for row in rows]
        frame = spark.createDataFrame([tuple(r[name] for name in schema.names) for r in stamped], schema).coalesce(1)
        append(frame, BATCH_LEDGER, self.settings, self.ledger_step, batch.transaction)
        return BatchReport(
            stream=self.stream,
            query_id=batch.transaction.query_id,
            batch_id=batch.transaction.batch_id,
            seconds=time.monotonic() - started,
            **totals,
        )


def reject_rows(work: SplitRows, campaigns: pa.Table) -> pa.Table:
    """Rejected and conflicting records of a split, columns of _REJECT_DDL."""
    split = work.task.split
    rows: list[dict[str, Any]] = []
    for reject in staged(work.task, "rejects", campaigns).to_pylist():
        rows.append(
            {
                "outcome": "rejected",
                "reason_codes": reject["reason_codes"],
                "source_line": 0 if reject["n"] < 0 else reject["n"] + work.first_line,
                "raw": reject["raw"],
                "raw_encoding": reject["raw_encoding"],
                "raw_size_bytes": reject["raw_size_bytes"],
                "record_id": reject["record_id"],
                "record_time": reject["time_us"],
                "fingerprint": None,
                "accepted_fingerprint": None,
            }
        )
    if len(work.conflicts):
        contract_id = "event_id" if work.task.stream == "events" else "order_id"
        time_field = "event_time" if work.task.stream == "events" else "order_time"
        table = staged(work.task, "rows", campaigns).take(pa.array(work.conflicts))
        numbers = table["n"].to_numpy().astype(np.int64)
        raws = {number: rest for number, *rest in raw_lines(split, numbers)}
        conflicts = table.select(["n", contract_id, time_field, "fingerprint"]).to_pylist()
        for record, accepted in zip(conflicts, work.accepted_fingerprints.tolist(), strict=True):
            raw, encoding, size = raws[record["n"]]
            rows.append(
                {
                    "outcome": "conflict",
                    "reason_codes": ["conflict"],
                    "source_line": record["n"] + work.first_line,
                    "raw": raw,
                    "raw_encoding": encoding,
                    "raw_size_bytes": size,
                    "record_id": record[contract_id],
                    "record_time": record[time_field],
                    "fingerprint": hex_fingerprint(record["fingerprint"]),
                    "accepted_fingerprint": hex_fingerprint(accepted),
                }
            )
    rows.sort(key=lambda row: row["source_line"])
    schema = pa.schema(
        [
            ("outcome", pa.string()),
            ("reason_codes", pa.list_(pa.string())),
            ("region", pa.string()),
            ("source_file", pa.string()),
            ("source_line", pa.int64()),
            ("raw", pa.string()),
            ("raw_encoding", pa.string()),
            ("raw_size_bytes", pa.int64()),
            ("record_id", pa.string()),
            ("record_time", pa.timestamp("us", "UTC")),
            ("fingerprint", pa.string()),
            ("accepted_fingerprint", pa.string()),
        ]
    )
    return pa.Table.from_pylist([{**row, "region": split.region, "source_file": split.name} for row in rows], schema=schema)


def _hour(value: int) -> datetime | None:
    return None if value == NO_HOUR else _EPOCH + timedelta(hours=value)


def ledger_rows(batch: Batch, classified: Classification, stream: str) -> list[dict[str, Any]]:
    """The batch's ledger: one dict a region and event hour, in a fixed order (hour None last)."""
    regions = sorted({task.split.region for task in batch.tasks})
    number = {region: i for i, region in enumerate(regions)}
    of_split = [number[task.split.region] for task in batch.tasks]
    region = np.repeat(of_split, batch.row_counts).astype(np.int64)
    hours = batch.column("hours", np.int32).astype(np.int64)
    reject_counts = [len(split.reject_hours) // 4 for split in batch.splits]
    reject_region = np.repeat(of_split, reject_counts).astype(np.int64)
    reject_hours = batch.column("reject_hours", np.int32).astype(np.int64)

    cells, at = np.unique(
        np.stack((np.concatenate((region, reject_region)), np.concatenate((hours, reject_hours)))),
        axis=1,
        return_inverse=True,
    )
    at = at.reshape(-1)
    valid_at, reject_at = at[: len(region)], at[len(region) :]
    size = cells.shape[1]
    outcome = classified.outcome
    accepted = outcome == Outcome.ACCEPTED

    def count(mask: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.bincount(valid_at[mask], minlength=size)

    spend = np.zeros(size, dtype=np.int64)
    np.add.at(spend, valid_at[accepted], batch.column("spend", np.int64)[accepted])
    received = np.full(size, np.iinfo(np.int64).min)
    np.maximum.at(received, valid_at[accepted], batch.column("received", np.int64)[accepted])
    measures = {
        "offered": np.bincount(at, minlength=size),
        "accepted": count(accepted),
        "duplicate": count(outcome == Outcome.DUPLICATE),
        "conflict": count(outcome == Outcome.CONFLICT),
        "rejected": np.bincount(reject_at, minlength=size),
        "late": count(accepted & batch.column("late", np.bool_)),
        "invalid_traffic": np.zeros(size, dtype=np.int64),
        "unpriced": count(accepted & batch.column("unpriced", np.bool_)),
        "spend_nanos": spend,
    }
    ingested = _EPOCH + timedelta(microseconds=batch.plan.limits.ingested_us)
    rows = [
        {
            "stream": stream,
            "source": "files",
            "region": regions[int(cells[0, i])],
            "event_hour": _hour(int(cells[1, i])),
            **{name: int(values[i]) for name, values in measures.items()},
            "max_received_at": None if received[i] == np.iinfo(np.int64).min else _EPOCH + timedelta(microseconds=int(received[i])),
            "ingested_at": ingested,
        }
        for i in range(size)
    ]
    if not rows:  # files without a line: the batch still is complete only when it stands in the ledger
        zero = dict.fromkeys(measures, 0)
        rows = [
            {
                "stream": stream,
                "source": "files",
                "region": region,
                "event_hour": None,
                **zero,
                "max_received_at": None,
                "ingested_at": ingested,
            }
            for region in regions
        ]
    return rows


class EventsJob(StreamJob):
    """Ad events."""

    stream = "events"
    accepted_table = EVENTS
    rejected_table = REJECTED_EVENTS
    rejected_step = Step.REJECTED_EVENTS
    ledger_step = Step.EVENTS_LEDGER

    def __init__(self, settings: Settings, report: Callable[[BatchReport], None]) -> None:
        super().__init__(settings, report)
        self.index = KeyIndex(settings.key_index_path)

    def classify(self, spark: SparkSession, batch: Batch, history_version: int) -> Classification:
        """See StreamJob."""
        bring_index_to(spark, self.settings, self.index, history_version)
        return classify(batch.keys, self.index.lookup)

    def write_accepted(self, spark: SparkSession, batch: Batch, history_version: int, classified: Classification) -> int:
        """See StreamJob."""
        accepted = classified.outcome == Outcome.ACCEPTED
        rows = int(accepted.sum())
        work = self.split_rows(batch, classified)
        campaigns = self._campaigns(spark, batch.plan)
        ingested_us = batch.plan.limits.ingested_us
        columns = [f for f in table_schema(EVENTS) if not f.name.startswith("_")]
        schema = ", ".join(f"{f.name} {f.dataType.simpleString()}" for f in columns)

        def events(parts: Iterator[Any]) -> Iterator[Any]:
            for split in _tasks_of(parts):
                table = accepted_rows(split, campaigns)
                if table.num_rows:
                    made = event_columns(table, split.task.split.name, split.first_line, ingested_us)
                    yield from made.select([f.name for f in columns]).to_batches(max_chunksize=_BATCH_OF_ROWS)

        frame = self._stamp(self.work_frame(spark, work, rows).mapInArrow(events, schema), batch)
        append(frame, EVENTS, self.settings, Step.EVENTS, batch.transaction, batch.plan.to_metadata(batch.transaction))
        self._remember(batch.keys.take(np.flatnonzero(accepted)), history_version, batch.transaction)
        return rows

    def write_derived(self, spark: SparkSession, batch: Batch, classified: Classification) -> None:
        """The increments of minute_metrics."""
        campaigns = self._campaigns(spark, batch.plan)

        def sums(parts: Iterator[Any]) -> Iterator[Any]:
            for split in _tasks_of(parts):
                yield from increments(accepted_rows(split, campaigns)).to_batches(max_chunksize=_BATCH_OF_ROWS)

        work = self.split_rows(batch, classified)
        summed = (
            self.work_frame(spark, work, len(classified.outcome))
            .mapInArrow(sums, _INCREMENT_DDL)
            .groupBy(*METRIC_KEYS)
            .agg(*(F.sum(name).alias(name) for name in METRIC_MEASURES))
        )
        frame = with_record_uuid(self._stamp(summed, batch))
        append(frame, MINUTE_METRICS, self.settings, Step.MINUTE_METRICS, batch.transaction)

    def _remember(self, keys: Keys, history_version: int, transaction: Transaction) -> None:
        """Put the batch's keys into the index, if its commit is the next one; else the next batch catches up."""
        log = DeltaLog(self.settings.table_uri(EVENTS.name))
        if "://" in log.uri:
            return
        commit = log.commit(history_version + 1)
        if commit and commit.txn == (transaction.query_id, transaction.batch_id):
            with durable(Step.KEY_INDEX, transaction.batch_id):
                self.index.append(keys, commit.version)


def accepted_rows(work: SplitRows, campaigns: pa.Table) -> pa.Table:
    """The staged rows of a split that are neither duplicates nor conflicts."""
    table = staged(work.task, "rows", campaigns)
    if not len(work.dropped):
        return table
    keep = np.ones(table.num_rows, dtype=bool)
    keep[work.dropped] = False
    return table.filter(pa.array(keep))


def with_record_uuid(frame: DataFrame) -> DataFrame:
    """Adds event_minute, event_date and record_uuid: the MD5 of the batch's identity and the row's key, written as a UUID."""
    parts = [F.col("_query_id"), F.col("_batch_id").cast("string"), F.col("event_minute_us").cast("string")]
    parts += [F.coalesce(F.concat(F.length(name).cast("string"), F.lit(":"), F.col(name)), F.lit("-")) for name in METRIC_KEYS[1:]]
    digest = F.md5(F.concat_ws("\x1f", *parts))
    pieces = [digest.substr(start, length) for start, length in ((1, 8), (9, 4), (13, 4), (17, 4), (21, 12))]
    return (
        frame.withColumn("event_minute", F.timestamp_micros("event_minute_us"))
        .withColumn("event_date", F.to_date("event_minute"))
        .withColumn("record_uuid", F.concat_ws("-", *pieces))
    )


def bring_index_to(spark: SparkSession, settings: Settings, index: KeyIndex, version: int) -> None:
    """Make the index cover exactly ``version`` of `events`: cut, catch up, or rebuild from the table."""
    uri = settings.table_uri(EVENTS.name)
    log = DeltaLog(uri, spark)
    table_id = _table_id(log, spark, uri)
    if index.table_id != table_id or (index.version > version and not index.can_cut(version)):
        _rebuild(spark, uri, index, table_id, version)
        return
    if index.version > version:
        index.cut(version)
    for number in range(index.version + 1, version + 1):
        commit = log.commit(number)
        if commit is None or commit.data_removed:
            _rebuild(spark, uri, index, table_id, version)
            return
        paths = [f"{uri}/{unquote(action['path'])}" for action in commit.data_added]
        keys = _keys_of(spark.read.parquet(*paths)) if paths else Keys.concatenate([])
        index.append(keys, number)


def _table_id(log: DeltaLog, spark: SparkSession, uri: str) -> str:
    first = log.commit(0)
    if first and first.table_id:
        return first.table_id
    return str(spark.sql(f"describe detail delta.`{uri}`").first()["id"])  # type: ignore[index]


def _keys_of(frame: DataFrame) -> Keys:
    return keys_of_ids(frame.select("event_id", "fingerprint").toArrow(), "event_id", "fingerprint")


_REBUILD_FILES = 64


def _rebuild(spark: SparkSession, uri: str, index: KeyIndex, table_id: str, version: int) -> None:
    index.reset(table_id)
    files = spark.read.format("delta").option("versionAsOf", version).load(uri).inputFiles()
    for start in range(0, len(files), _REBUILD_FILES):
        group = [local_path(name) for name in files[start : start + _REBUILD_FILES]]
        index.append(_keys_of(spark.read.parquet(*group)), version)
    if not files:
        index.append(Keys.concatenate([]), version)


class OrdersJob(StreamJob):
    """Orders: few, and one row an order, so they are settled row by row against the table and merged."""

    stream = "orders"
    accepted_table = ORDERS
    rejected_table = REJECTED_ORDERS
    rejected_step = Step.REJECTED_ORDERS
    ledger_step = Step.ORDERS_LEDGER

    def classify(self, spark: SparkSession, batch: Batch, history_version: int) -> Classification:
        """See StreamJob."""
        campaigns = CAMPAIGN_SCHEMA.empty_table()
        parts = [
            staged(task, "rows", campaigns)
            .append_column("source_line", pa.array(staged(task, "rows", campaigns)["n"].to_numpy() + first))
            .append_column("source_file", pa.repeat(pa.scalar(task.split.name), count))
            for task, first, count in zip(batch.tasks, batch.first_lines, batch.row_counts, strict=True)
        ]
        records = pa.concat_tables(parts).to_pylist() if parts else []
        known = self._known(spark, sorted({r["order_id"] for r in records}), history_version)
        self._settled = settle_orders(records, known)
        return Classification(
            np.array(self._settled.outcome, dtype=np.int8),
            np.array(self._settled.accepted_fingerprint, dtype=np.uint64),
        )

    def _known(self, spark: SparkSession, ids: list[str], version: int) -> dict[str, dict[str, Any]]:
        if not ids:
            return {}
        wanted = spark.createDataFrame(pa.table({"order_id": ids}))
        orders = spark.read.format("delta").option("versionAsOf", version).load(self.settings.table_uri(ORDERS.name))
        found = orders.join(F.broadcast(wanted), "order_id", "left_semi").toArrow().to_pylist()
        return {row["order_id"]: row for row in found}

    def write_accepted(self, spark: SparkSession, batch: Batch, history_version: int, classified: Classification) -> int:
        """See StreamJob."""
        names = [n for n in table_schema(ORDERS).names if n not in ("ingested_at", "_query_id", "_batch_id")]
        changed = pa.Table.from_pylist(
            [{name: row[name] for name in names} for row in self._settled.changed], schema=_orders_arrow(names)
        )
        frame = self._stamp(spark.createDataFrame(changed), batch).coalesce(1)
        merge_orders(frame, ORDERS, self.settings, batch.transaction, batch.plan.to_metadata(batch.transaction))
        return sum(1 for outcome in self._settled.outcome if outcome == Outcome.ACCEPTED)


def _orders_arrow(names: list[str]) -> pa.Schema:
    kinds = {
        "total_micros": pa.int64(),
        "source_line": pa.int64(),
        "fingerprint": pa.int64(),
        "has_placed": pa.bool_(),
        "is_late": pa.bool_(),
    }
    times = ("order_time", "received_at", "cancelled_at")
    return pa.schema([(n, pa.timestamp("us", "UTC") if n in times else kinds.get(n, pa.string())) for n in names])


def _escape_glob(text: str) -> str:
    return "".join(f"\\{character}" if character in "*?[]{}\\" else character for character in text)


class _StopRequest:
    """SIGTERM or SIGINT: end after the current batch."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.event.set()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def run_ingest(
    settings: Settings,
    *,
    continuous: bool = False,
    trigger_seconds: float = 5.0,
    progress: Callable[[BatchReport], None] | None = None,
    spark: SparkSession | None = None,
) -> IngestReport:
    """Ingest events and orders: all that is there, or, with ``continuous``, until SIGTERM (which ends after the current batch).

    ``progress`` is called after each batch. ``spark`` is for callers with a session of their own; it is not stopped.
    Raises BusyError where another ingest runs on the same home, AdtallyError where a batch failed.
    """
    settings.home_path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.home_path / ".ingest.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(
            f"another ingest runs on {settings.home_path}", hint="stop it, or use its ADTALLY_HOME for reading"
        ) from None
    total = IngestReport()
    guard = threading.Lock()

    def report(batch: BatchReport) -> None:
        nonlocal total
        with guard:
            total = total.plus(batch)
            if progress is not None:
                progress(batch)

    try:
        with _StopRequest() as stop:
            session = spark or build_session(settings, "adtally-ingest")
            try:
                ensure_tables(session, settings)
                load_campaigns(session, settings)
                _run_queries(
                    session,
                    [EventsJob(settings, report), OrdersJob(settings, report)],
                    stop.event,
                    continuous,
                    trigger_seconds,
                )
            finally:
                if spark is None:
                    session.stop()
        return total
    finally:
        lock.release()


def _run_queries(
    spark: SparkSession, jobs: list[StreamJob], stop: threading.Event, continuous: bool, trigger_seconds: float
) -> None:
    queries = [job.start(spark, continuous=continuous, trigger_seconds=trigger_seconds) for job in jobs]
    try:
        while any(query.isActive for query in queries):
            if stop.is_set():
                for query in queries:
                    _stop_after_batch(query)
                break
            for query in queries:
                _raise_failure(query)
            stop.wait(0.2)
        for query in queries:
            _raise_failure(query)
    finally:
        for query in queries:
            if query.isActive:
                query.stop()


def _stop_after_batch(query: StreamingQuery) -> None:
    """Let a running batch end (bounded by nothing but the batch), then stop between two batches."""
    while query.isActive and query.status["isTriggerActive"]:
        time.sleep(0.05)
    query.stop()


def _raise_failure(query: StreamingQuery) -> None:
    error = query.exception()
    if error is None:
        return
    text = str(error)
    for known in (ConservationError,):
        if known.__name__ in text:
            raise known(_last_line(text)) from error
    raise AdtallyError(f"the {query.name} stream failed: {_last_line(text)}", hint="run with --debug for all of it") from error


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line or "Exception" in line]
    return (named or lines or ["unknown"])[0][:500]
