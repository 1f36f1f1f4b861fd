"""The stream of ad events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.config import Settings
from spark_jobs.ingest.batch import Batch, BatchReport, Plan
from spark_jobs.ingest.campaigns import campaigns_at
from spark_jobs.ingest.dedupe.classify import Classification, accepted_keys, classify
from spark_jobs.ingest.dedupe.index import KeyIndex
from spark_jobs.ingest.dedupe.keys import Keys, keys_of_ids
from spark_jobs.ingest.dedupe.shards import ShardedIndex, ShardedKeys
from spark_jobs.ingest.event_columns import INCREMENT_SCHEMA, METRIC_MEASURES, increment_columns, sum_increments
from spark_jobs.ingest.in_force import InForce
from spark_jobs.ingest.source import RecordSource
from spark_jobs.ingest.stream import StreamJob
from spark_jobs.ingest.write import Written
from spark_jobs.lake.checked import DamagedError
from spark_jobs.lake.data_files import DataFile
from spark_jobs.lake.locks import WRITE_EVENTS, exclusive
from spark_jobs.lake.log import Commit, DeltaLog, commit_identity
from spark_jobs.lake.reading import open_table, read_files, table_files
from spark_jobs.lake.stamp import stamped
from spark_jobs.lake.tables import EVENTS, MINUTE_METRICS
from spark_jobs.lake.writes import DeltaSink
from spark_jobs.steps import Step, durable
from spark_jobs.traffic.rules import InvalidTrafficRules, rules_of


@dataclass(frozen=True)
class ClassifiedEvents(Classification):
    """The outcome of each record, and ``new_keys``: those of the accepted ones."""

    new_keys: Keys | ShardedKeys


class EventsJob(StreamJob[ClassifiedEvents]):
    """Ad events."""

    stream = "events"

    def __init__(
        self,
        settings: Settings,
        report: Callable[[BatchReport], None],
        source: RecordSource | None = None,
        index: KeyIndex | ShardedIndex | None = None,
        in_force: InForce | None = None,
        notice: Callable[[str], None] = lambda _line: None,
    ) -> None:
        """All jobs of one process must share ``index`` and ``in_force``. ``notice`` gets a line if the index is rebuilt."""
        super().__init__(settings, report, source)
        self._notice = notice
        self.index = index or KeyIndex(settings.key_index_path)
        self._events = DeltaSink(EVENTS, settings)
        self._metrics = DeltaSink(MINUTE_METRICS, settings)
        self._in_force = in_force or InForce(settings)
        self._references: dict[tuple[int, str | None], tuple[pa.Table, InvalidTrafficRules]] = {}  # of the last plan

    def newest_references(self) -> tuple[int, str | None]:
        """See StreamJob."""
        return self._in_force.prices(), self._in_force.rule_set()

    def references(self, plan: Plan) -> tuple[pa.Table, InvalidTrafficRules]:
        """See StreamJob."""
        key = plan.campaigns_version, plan.rule_set
        if key not in self._references:
            self._references = {key: (campaigns_at(self.settings, key[0]), rules_of(self.settings, key[1]))}
        return self._references[key]

    @property
    def scatters_keys(self) -> bool:
        """See StreamJob."""
        return isinstance(self.index, ShardedIndex)

    def classify(self, batch: Batch) -> ClassifiedEvents:
        """See StreamJob."""
        bring_index_to(self.settings, self.index, batch.history_version, self._notice)
        try:
            return self._look_up(batch)
        except DamagedError as damage:
            self.index.problem = str(damage)
        bring_index_to(self.settings, self.index, batch.history_version, self._notice)
        return self._look_up(batch)

    def _look_up(self, batch: Batch) -> ClassifiedEvents:
        new: Keys | ShardedKeys
        if isinstance(self.index, ShardedIndex):
            assert batch.scattered is not None
            rows = {split.number: len(split.rows) for split in batch.splits if len(split.rows)}
            found, new = self.index.classify(batch.scattered, rows)
        else:
            found = classify(batch.keys, self.index.lookup)
            new = accepted_keys(batch.keys, found)
        return ClassifiedEvents(found.outcome, found.accepted_fingerprint, new)

    def events_uri(self, batch: Batch) -> str | None:
        """See StreamJob."""
        return None if batch.committed else self._events.uri

    def contradictions(
        self, batch: Batch, classified: ClassifiedEvents, written: list[Written], ledger: list[dict[str, Any]]
    ) -> Iterator[str]:
        """See StreamJob: ledger, data files of events, and increments must agree, in rows and in money."""
        accepted, spent = (sum(int(row[name]) for row in ledger) for name in ("accepted", "spend_nanos"))
        if batch.committed is None:
            rows = sum(file.rows for part in written for file in part.events)
            if rows != accepted:
                yield f"{accepted} accepted, but {rows} written"
        else:
            yield from self._differences_from(batch.committed, classified.new_keys)
        sums = pa.concat_tables([INCREMENT_SCHEMA.empty_table(), *(part.increments for part in written)])
        totals = {name: int(pc.sum(sums[name]).as_py() or 0) for name in METRIC_MEASURES}
        counted = sum(totals[name] for name in ("impressions", "clicks", "invalid_impressions", "invalid_clicks"))
        charged = totals["spend_nanos"]
        if counted != accepted:
            yield f"{accepted} accepted, but {counted} in the increments"
        if charged != spent:
            yield f"{spent} nanos accepted, but {charged} in the increments"

    def _differences_from(self, committed: Commit, keys: Keys | ShardedKeys) -> Iterator[str]:
        """Yield how the batch's own commit of `events` differs from the records that the batch accepts now."""
        rows = sum(json.loads(action["stats"])["numRecords"] for action in committed.data_added)
        if rows != len(keys):
            yield f"{len(keys)} accepted, but {rows} in the commit of events that was made before (version {committed.version})"
            return
        try:
            earlier = _keys_of(self._events.uri, [action["path"] for action in committed.data_added])
        except FileNotFoundError:  # vacuumed since
            return
        if not keys.are(earlier):
            yield f"the accepted events differ from those that version {committed.version} of events has of this batch"

    def commit_accepted(self, batch: Batch, classified: ClassifiedEvents, written: list[Written]) -> None:
        """See StreamJob."""
        if batch.committed is None:
            files = [file for part in written for file in part.events]
            self._events.append(files, Step.EVENTS, batch.transaction, batch.plan.to_metadata(batch.transaction))
        self._add_to_index(classified.new_keys, batch)

    def write_derived(self, batch: Batch, written: list[Written]) -> list[DataFile]:
        """Write the increments of `minute_metrics`."""
        sums = sum_increments([part.increments for part in written])
        columns = increment_columns(sums, batch.transaction.query_id, batch.transaction.batch_id)
        return self._metrics.write(stamped(columns, MINUTE_METRICS, batch.stamp))

    def commit_derived(self, batch: Batch, files: list[DataFile]) -> None:
        """Commit the increments."""
        self._metrics.append(files, Step.MINUTE_METRICS, batch.transaction)

    def _add_to_index(self, keys: Keys | ShardedKeys, batch: Batch) -> None:
        """Add the batch's keys to the index if its commit is the next one. Otherwise the next batch brings the index up to date."""
        commit = DeltaLog(self._events.uri).commit(batch.history_version + 1)
        if commit and commit.txn == (batch.transaction.query_id, batch.transaction.batch_id):
            try:
                with durable(Step.KEY_INDEX, batch.transaction.batch_id):
                    self.index.append(keys, commit.version, commit_identity(commit))  # type: ignore[arg-type]
            except DamagedError as damage:  # a merge of runs found it: the next batch rebuilds the index
                self.index.problem = str(damage)


def bring_index_to(
    settings: Settings, index: KeyIndex | ShardedIndex, version: int, notice: Callable[[str], None] = lambda _line: None
) -> None:
    """Make the index cover exactly ``version`` of `events`: cut it, extend it, or rebuild it from the table.

    Rebuilds it if it is damaged, if the table no longer has the commit that it covers (a rollback, a restored backup), if a later
    commit removed keys, or if vacuum removed data files of a later commit. ``notice`` gets a line if it is damaged.
    """
    log = DeltaLog(settings.table_uri(EVENTS.name))
    table_id = log.table_id()
    try:
        if index.problem is not None:
            raise DamagedError(index.problem)
        if _can_follow(log, index, table_id, version):
            if index.version > version:
                index.cut(version, commit_identity(log.commit(version)))
            if all(_append_commit(log, index, number) for number in range(index.version + 1, version + 1)):
                return
    except DamagedError as error:
        notice(f"the key index is rebuilt from table events: {error}")
    index.rebuild(table_id, keys_of_version(settings, version), version, commit_identity(log.commit(version)))


def _can_follow(log: DeltaLog, index: KeyIndex | ShardedIndex, table_id: str, version: int) -> bool:
    """Return whether the index belongs to this table and its history, and can be cut or extended to ``version``."""
    if index.table_id != table_id or (index.version > version and not index.can_cut(version)):
        return False
    return index.version < 0 or index.commit == commit_identity(log.commit(index.version))


def _append_commit(log: DeltaLog, index: KeyIndex | ShardedIndex, version: int) -> bool:
    """Add the keys of one commit to the index; return False if they cannot be read from the commit."""
    commit = log.commit(version)
    added = None if commit is None else _files_with_keys(commit)
    if added is None:
        return False
    try:
        keys = _keys_of(log.uri, added)
    except FileNotFoundError:
        return False
    index.append(keys, version, commit_identity(commit))
    return True


def _files_with_keys(commit: Commit) -> list[str] | None:
    """Return the data files with the keys that a commit added; None if it removed keys."""
    if not commit.data_removed:
        return [action["path"] for action in commit.data_added]
    # a correction that rewrote files notes whether it kept all keys, and which files add keys
    return list(commit.metadata["added_files"]) if commit.metadata.get("keys") == "kept" else None


_KEY_SCHEMA = pa.schema([EVENTS.schema.field("event_id"), EVENTS.schema.field("fingerprint")])


def _keys_of(uri: str, paths: list[str]) -> Keys:
    """Read the keys of data files of `events`; paths as in the log."""
    return keys_of_ids(read_files(uri, paths, _KEY_SCHEMA), *_KEY_SCHEMA.names)


_REBUILD_ROWS = 4_000_000


def keys_of_version(settings: Settings, version: int) -> Iterator[Keys]:
    """Read the keys of a version of `events`, some files at a time. Raises FileNotFoundError if files of it were vacuumed."""
    uri = settings.table_uri(EVENTS.name)
    paths: list[str] = []
    rows = 0
    for file in table_files(open_table(uri, version)):
        if paths and rows + (file.rows or 0) > _REBUILD_ROWS:
            yield _keys_of(uri, paths)
            paths, rows = [], 0
        paths.append(file.path)
        rows += file.rows or 0
    if paths:
        yield _keys_of(uri, paths)


def finish_merges(settings: Settings, index: KeyIndex, notice: Callable[[str], None]) -> None:
    """Wait for the merges of the index that run beside the batches. ``notice`` gets a line if they find damage."""
    try:
        index.finish_merges(lambda: exclusive(settings, WRITE_EVENTS))
    except DamagedError as damage:
        notice(f"the next ingest rebuilds the key index: {damage}")
