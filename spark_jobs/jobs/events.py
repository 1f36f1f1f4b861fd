"""The stream of ad events."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime

import pyarrow as pa
from deltalake import DeltaTable

from spark_jobs.config import Settings
from spark_jobs.dedupe.classify import Classification, Outcome, classify
from spark_jobs.dedupe.index import KeyIndex
from spark_jobs.dedupe.keys import Keys, keys_of_ids
from spark_jobs.delta_log import Commit, DeltaLog
from spark_jobs.jobs.batch import Batch, BatchReport, Plan
from spark_jobs.jobs.campaigns import campaigns_at, load_campaigns
from spark_jobs.jobs.stream import StreamJob, stamp_of
from spark_jobs.rules.invalid_traffic import KIND, InvalidTrafficRules, current_rules, rules_of
from spark_jobs.rules.store import keep_rule_set
from spark_jobs.sinks.delta import DeltaSink, Transaction
from spark_jobs.sources.delta import file_paths, read_files
from spark_jobs.sources.source import Source
from spark_jobs.steps import Step, durable
from spark_jobs.tables import EVENTS, MINUTE_METRICS, REJECTED_EVENTS
from spark_jobs.tasks.write import Written, from_stream
from spark_jobs.transforms.events import increment_columns, sum_increments
from spark_jobs.transforms.stamp import stamped


class EventsJob(StreamJob):
    """Ad events."""

    stream = "events"
    accepted_table = EVENTS
    rejected_table = REJECTED_EVENTS
    rejected_step = Step.REJECTED_EVENTS
    ledger_step = Step.EVENTS_LEDGER

    def __init__(
        self,
        settings: Settings,
        report: Callable[[BatchReport], None],
        source: Source | None = None,
        index: KeyIndex | None = None,
    ) -> None:
        """``index``: of several jobs in one process all must have the same."""
        super().__init__(settings, report, source)
        self.index = index or KeyIndex(settings.key_index_path)
        self._events = DeltaSink(EVENTS, settings)
        self._metrics = DeltaSink(MINUTE_METRICS, settings)
        self._price_list: tuple[int, pa.Table] | None = None
        self._rules: tuple[str | None, InvalidTrafficRules] | None = None

    def plan_prices(self) -> int:
        """See StreamJob."""
        return load_campaigns(self.settings) or 0

    def prices(self, plan: Plan) -> pa.Table:
        """See StreamJob."""
        if self._price_list is None or self._price_list[0] != plan.campaigns_version:
            self._price_list = (plan.campaigns_version, campaigns_at(self.settings, plan.campaigns_version))
        return self._price_list[1]

    def plan_rules(self) -> str:
        """See StreamJob."""
        rules = current_rules(self.settings)
        if self._rules is None or self._rules[0] is None or self._rules[1] != rules:
            self._rules = (keep_rule_set(self.settings, KIND, rules, datetime.now(UTC)), rules)
        assert self._rules[0] is not None
        return self._rules[0]

    def rules(self, plan: Plan) -> InvalidTrafficRules:
        """See StreamJob."""
        if self._rules is None or self._rules[0] != plan.rule_set:
            self._rules = (plan.rule_set, rules_of(self.settings, plan.rule_set))
        return self._rules[1]

    def classify(self, batch: Batch, history_version: int) -> Classification:
        """See StreamJob."""
        bring_index_to(self.settings, self.index, history_version)
        return classify(batch.keys, self.index.lookup)

    def events_uri(self, batch: Batch) -> str | None:
        """See StreamJob."""
        return None if batch.committed else self._events.uri

    def commit_accepted(self, batch: Batch, history_version: int, classified: Classification, written: list[Written]) -> int:
        """See StreamJob."""
        accepted = classified.outcome == Outcome.ACCEPTED
        files = [file for part in written for file in part.events]
        if batch.committed is None:
            self._events.append(files, Step.EVENTS, batch.transaction, batch.plan.to_metadata(batch.transaction))
            rows = sum(file.rows for file in files)
        else:
            rows = sum(json.loads(action["stats"])["numRecords"] for action in batch.committed.data_added)
        order = batch.keys.order  # made to classify: so the index gets its keys sorted
        self._remember(batch.keys.take(order[accepted[order]]), history_version, batch.transaction)
        return rows

    def commit_derived(self, batch: Batch, written: list[Written]) -> None:
        """The increments of minute_metrics."""
        sums = sum_increments([from_stream(part.increments) for part in written if part.increments is not None])
        stamp = stamp_of(batch)
        rows = stamped(increment_columns(sums, stamp.query_id, stamp.batch_id), MINUTE_METRICS, stamp)
        self._metrics.append_rows(rows, Step.MINUTE_METRICS, batch.transaction)

    def _remember(self, keys: Keys, history_version: int, transaction: Transaction) -> None:
        """Put the batch's keys into the index, if its commit is the next one; else the next batch catches up."""
        commit = DeltaLog(self._events.uri).commit(history_version + 1)
        if commit and commit.txn == (transaction.query_id, transaction.batch_id):
            with durable(Step.KEY_INDEX, transaction.batch_id):
                self.index.append(keys, commit.version)


def bring_index_to(settings: Settings, index: KeyIndex, version: int) -> None:
    """Make the index cover exactly ``version`` of `events`: cut, catch up, or rebuild from the table.

    It is rebuilt where a commit took keys away, and where the data files of a commit behind it are gone (vacuumed).
    """
    uri = settings.table_uri(EVENTS.name)
    log = DeltaLog(uri)
    table_id = _table_id(log, uri)
    if index.table_id != table_id or (index.version > version and not index.can_cut(version)):
        _rebuild(uri, index, table_id, version)
        return
    if index.version > version:
        index.cut(version)
    for number in range(index.version + 1, version + 1):
        commit = log.commit(number)
        try:
            added = None if commit is None else _files_with_keys(commit)
            if added is not None:
                index.append(_keys_of(uri, added), number)
                continue
        except FileNotFoundError:
            pass
        _rebuild(uri, index, table_id, version)
        return


def _files_with_keys(commit: Commit) -> list[str] | None:
    """The data files in which the keys lie that a commit added; None where it took keys away.

    A correction that rewrote files says so if every key in them is still there, and which files are new (sinks/corrections.py).
    """
    if not commit.data_removed:
        return [action["path"] for action in commit.data_added]
    try:
        told = json.loads(commit.user_metadata or "{}")
    except ValueError:
        return None
    return list(told["added_files"]) if isinstance(told, dict) and told.get("keys") == "kept" else None


def _table_id(log: DeltaLog, uri: str) -> str:
    first = log.commit(0)
    return first.table_id if first and first.table_id else str(DeltaTable(uri).metadata().id)


_KEY_SCHEMA = pa.schema([EVENTS.schema.field("event_id"), EVENTS.schema.field("fingerprint")])


def _keys_of(uri: str, paths: list[str]) -> Keys:
    """The keys of data files of `events`; paths as they stand in the log."""
    return keys_of_ids(read_files(uri, paths, _KEY_SCHEMA), *_KEY_SCHEMA.names)


_REBUILD_FILES = 64


def _rebuild(uri: str, index: KeyIndex, table_id: str, version: int) -> None:
    files = file_paths(uri, version)
    groups = (files[start : start + _REBUILD_FILES] for start in range(0, len(files), _REBUILD_FILES))
    index.rebuild(table_id, (_keys_of(uri, group) for group in groups), version)
