"""The billing ledger: a line per day, campaign, store and currency when the day closes, and one for each later change.

A run charges a day when all of its hours are closed. For a later change of its spend (late events, invalid clicks, a repair, a
backfill) it posts further lines, each with its reason, its run and its amount. It never changes or removes a line. Amounts are
differences of the rounded total, so the lines of a key sum to its spend, rounded once (half away from zero), as in
`fct_campaign_day`. docs/decisions/0009 has the reasons.

A run reads only days that have closed, or got increments or ledger rows, since the last posting.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime

import duckdb

from spark_jobs.config import Settings
from spark_jobs.corrections.run import finish_corrections
from spark_jobs.corrections.write_ahead import decided_corrections
from spark_jobs.lake.acts import complete_audit_log
from spark_jobs.lake.chain import anchor, append_linked
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.locks import BILLING, exclusive
from spark_jobs.lake.log import Commit
from spark_jobs.lake.tables import BATCH_LEDGER, BILLING_LINES, MINUTE_METRICS, RESTATEMENTS, TRAFFIC_REVIEWS, Table
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.watermark import read_closing
from spark_jobs.steps import Step

Key = tuple[date, str, str, str]  # day, campaign, store, currency

_APP = "adtally-billing"  # a transaction of billing_lines has the number of the version that it makes
_MEASURES = ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "invalid_spend_nanos")
_OWN = "own"  # the spend that the batches wrote themselves; every other part is that of a correction run
_UNKNOWN = "unknown:"  # the spend of a correction run that `restatements` does not have
_REASON_OF_KIND = {"review": "invalid_traffic", "repair": "repair", "backfill": "backfill"}
_REASONS = ("late", "invalid_traffic", "repair", "backfill")  # the order of a posting's lines
_COMMITS_UNREAD = 500  # after so many commits of minute_metrics without a line, a commit without lines stores the progress


@dataclass(frozen=True)
class BillingLine:
    """A row of table `billing_lines`, without its place in the hash chain."""

    line_id: str
    line_type: str
    event_date: date
    campaign_id: str
    store_id: str
    currency: str
    amount_micros: int
    billed_micros: int
    spend_nanos: int
    impressions: int
    clicks: int
    invalid_impressions: int
    invalid_clicks: int
    invalid_spend_nanos: int
    reason: str
    run_id: str
    rule_set: str | None
    metrics_version: int
    posting: int
    spend_parts: str
    billed_at: datetime


@dataclass(frozen=True)
class BillingReport:
    """The lines that a run posted. ``days``: the number of closed days that it looked at."""

    run_id: str
    lines: list[BillingLine] = field(default_factory=list)
    days: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Progress:
    """The versions that the last posting read. Days before ``billed_through`` stay closed, whatever a new source reports."""

    metrics_version: int
    ledger_version: int
    billed_through: date

    def to_metadata(self) -> dict[str, object]:
        return asdict(self) | {"billed_through": self.billed_through.isoformat()}


@dataclass
class _Day:
    """The sums of a key's increments. ``parts`` are nanos by their origin: the batches (_OWN) and each correction run."""

    measures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_MEASURES, 0))
    parts: dict[str, int] = field(default_factory=lambda: defaultdict(int))


@dataclass(frozen=True)
class _Billed:
    """The sum of a key's lines, and the parts that the newest line stores."""

    micros: int
    parts: dict[str, int]


@dataclass
class _RestatementReasons:
    """Why correction runs changed spend. ``kinds``: by run, day, campaign and currency, then by kind, its nanos and rule set."""

    kinds: dict[tuple[str, date, str, str], dict[str, tuple[int, str | None]]]
    reviewed_by: dict[date, str]  # day -> rule set of its latest review


def bill(
    settings: Settings, *, run_id: str | None = None, now: datetime | None = None, progress: Callable[[str], None] | None = None
) -> BillingReport:
    """Post lines for the closed days whose spend differs from what is billed.

    Other runs wait. One commit has all lines of a run, so a killed run has posted all of them or none. A second run posts nothing.
    """
    began, name = time.monotonic(), run_id or uuid.uuid4().hex
    lake = Lake(settings)
    if not lake.exists(BATCH_LEDGER):
        return BillingReport(name)
    ensure_tables(settings)
    finish_corrections(settings)
    complete_audit_log(settings)
    with exclusive(settings, BILLING), lake.database() as database:
        anchor(lake, BILLING_LINES)  # the lines of an older adtally, before their version is pinned
        run = _BillingRun(lake, database, name, now or datetime.now(UTC))
        days = run.days()
        if days and progress:
            progress(f"looking at {len(days)} closed days")
        lines = run.lines(days) if days else []
        run.post(lines)
    return BillingReport(name, lines, len(days), time.monotonic() - began)


class _BillingRun:
    """One run, under the lock. It pins the ledger first: the other pinned tables contain each batch of the ledger completely."""

    def __init__(self, lake: Lake, database: duckdb.DuckDBPyConnection, run_id: str, now: datetime) -> None:
        self._lake, self._database, self._run_id, self._now = lake, database, run_id, now
        self._last = _last_progress(lake)
        snapshot = lake.pin(BATCH_LEDGER, MINUTE_METRICS, TRAFFIC_REVIEWS, BILLING_LINES)
        closed = read_closing(lake.settings).closed_through
        through = date.min if closed is None else closed.date()
        self._through = through if self._last is None else max(through, self._last.billed_through)
        # Before `restatements` is pinned: if no correction is running, that version explains all pinned increments.
        self._is_correcting = bool(decided_corrections(lake.settings))
        self._snapshot = snapshot.and_pin(RESTATEMENTS)
        self._waits = False

    # --- which days

    def days(self) -> list[date]:
        """Return the closed days whose totals can differ from what is billed."""
        days = {date.fromisoformat(day) for ((_, day),) in self._snapshot.partitions(MINUTE_METRICS)}
        changed = None if self._last is None else self._changed_days(self._last)
        if changed is not None and self._last is not None:
            days = {day for day in days if day >= self._last.billed_through} | changed
        return sorted(day for day in days if day < self._through)

    def _changed_days(self, last: _Progress) -> set[date] | None:
        """Return the days of the increments and ledger rows that were added or removed since the last posting; None: unknown."""
        metrics = self._commits(MINUTE_METRICS, last.metrics_version)
        ledger = self._commits(BATCH_LEDGER, last.ledger_version)
        if metrics is None or ledger is None:
            return None
        found = {
            date.fromisoformat(action["partitionValues"]["event_date"])
            for commit in metrics
            for action in (*commit.data_added, *commit.data_removed)
        }
        paths = [path for commit in ledger for path in commit.added_paths]
        try:
            rows = self._lake.read_files(BATCH_LEDGER, paths, "event_hour")
        except FileNotFoundError:  # compacted and vacuumed since, or damaged and taken out of the table by fsck
            return None
        return found | {hour.date() for hour in rows["event_hour"].to_pylist() if hour is not None}

    def _commits(self, table: Table, since: int) -> list[Commit] | None:
        """Return the commits after version ``since`` up to the pinned one; None if the log does not have them all."""
        until = self._snapshot.version(table)
        return None if since > until else self._lake.log(table).commits(since, until)

    # --- their lines

    def lines(self, days: list[date]) -> list[BillingLine]:
        """Return the lines that bring the billed amounts of these days to their spend."""
        billed, why = self._billed(days), self._reasons(days)
        totals = self._totals(days, why)
        keys = sorted(totals.keys() | billed.keys())
        return [line for key in keys for line in self._lines_of(key, totals.get(key, _Day()), billed.get(key), why)]

    def _totals(self, days: list[date], why: _RestatementReasons) -> dict[Key, _Day]:
        rows = self._database.execute(
            f"""
            with completed as (
                select distinct _query_id, _batch_id from {self._snapshot.scan(BATCH_LEDGER)}
                where event_hour >= date '{days[0]}' and event_hour < date '{days[-1]}' + 1
            )
            select event_date, campaign_id, store_id, currency, _run_id, {", ".join(f"sum({m})::hugeint" for m in _MEASURES)},
                sum(spend_nanos)::hugeint
            from {self._snapshot.scan(MINUTE_METRICS)} semi join completed using (_query_id, _batch_id)
            where {_among(days)} group by all
            """
        ).fetchall()
        stores: dict[tuple[date, str, str], set[str]] = defaultdict(set)
        for day, campaign, store, currency, *_ in rows:
            stores[day, campaign, currency].add(store)
        found: dict[Key, _Day] = defaultdict(_Day)
        for day, campaign, store, currency, run, *measures, nanos in rows:
            total = found[day, campaign, store, currency]
            for name, value in zip(_MEASURES, measures, strict=True):
                total.measures[name] += value or 0
            kinds = why.kinds.get((run, day, campaign, currency), {}) if run else {}
            for part, value in _split(run, nanos, kinds, is_alone=len(stores[day, campaign, currency]) == 1):
                total.parts[part] += value
        return found

    def _billed(self, days: list[date]) -> dict[Key, _Billed]:
        rows = self._database.execute(
            f"""
            select event_date, campaign_id, store_id, currency, sum(amount_micros)::hugeint, arg_max(spend_parts, posting)
            from {self._snapshot.scan(BILLING_LINES)} where {_among(days)} group by all
            """
        ).fetchall()
        return {
            (day, campaign, store, currency): _Billed(micros, json.loads(parts))
            for day, campaign, store, currency, micros, parts in rows
        }

    def _reasons(self, days: list[date]) -> _RestatementReasons:
        rows = self._database.execute(
            f"""
            select run_id, event_hour::date as event_date, campaign_id, currency, kind, sum(spend_nanos)::hugeint, max(rule_set)
            from {self._snapshot.scan(RESTATEMENTS)} where {_among(days, "event_hour::date")} group by all
            """
        ).fetchall()
        kinds: dict[tuple[str, date, str, str], dict[str, tuple[int, str | None]]] = defaultdict(dict)
        for run, day, campaign, currency, kind, nanos, rule_set in rows:
            kinds[run, day, campaign, currency][kind] = (nanos, rule_set)
        reviews = self._database.execute(
            f"""
            select event_hour::date, arg_max(rule_set, reviewed_at) from {self._snapshot.scan(TRAFFIC_REVIEWS)}
            where {_among(days, "event_hour::date")} group by all
            """
        ).fetchall()
        return _RestatementReasons(dict(kinds), dict(reviews))

    def _lines_of(self, key: Key, total: _Day, billed: _Billed | None, why: _RestatementReasons) -> Iterator[BillingLine]:
        parts = {name: nanos for name, nanos in sorted(total.parts.items()) if nanos}
        before = billed or _Billed(0, {})
        if parts == before.parts:
            return
        if self._is_correcting and any(part.startswith(_UNKNOWN) for part in parts):
            self._waits = True  # a correction has committed increments but not yet their reasons: the next run posts them
            return
        day, campaign, store, currency = key
        posting = self._snapshot.version(BILLING_LINES) + 1

        def line(reason: str, run: str | None, amount: int, billed_micros: int, nanos: int) -> BillingLine:
            name = json.dumps([day.isoformat(), campaign, store, currency, posting, reason, run])
            restated = why.kinds.get((run, day, campaign, currency), {}) if run else {}
            rule_sets = (rules for kind, (_, rules) in restated.items() if _REASON_OF_KIND.get(kind) == reason)
            return BillingLine(
                line_id=hashlib.sha256(name.encode()).hexdigest()[:32],
                line_type="charge" if reason == "day_closed" else "credit" if amount < 0 else "adjustment",
                event_date=day,
                campaign_id=campaign,
                store_id=store,
                currency=currency,
                amount_micros=amount,
                billed_micros=billed_micros,
                spend_nanos=nanos,
                **total.measures,
                reason=reason,
                run_id=run or self._run_id,
                rule_set=next(rule_sets, None) or why.reviewed_by.get(day),
                metrics_version=self._snapshot.version(MINUTE_METRICS),
                posting=posting,
                spend_parts=json.dumps(parts),
                billed_at=self._now,
            )

        if billed is None and (self._last is None or day >= self._last.billed_through):
            nanos = sum(parts.values())
            micros = nanos_to_micros(nanos)
            yield line("day_closed", None, micros, micros, nanos)
            return
        nanos, micros = sum(before.parts.values()), before.micros
        for (reason, run), change in _changes(before.parts, parts):
            nanos += change
            amount = nanos_to_micros(nanos) - micros
            micros += amount
            if amount:
                yield line(reason, run, amount, micros, nanos)

    # --- posting

    def post(self, lines: list[BillingLine]) -> None:
        """Append the lines and the progress in one commit. Without lines, only if the stored progress is far behind."""
        progress = _Progress(self._snapshot.version(MINUTE_METRICS), self._snapshot.version(BATCH_LEDGER), self._through)
        unread = progress.metrics_version - (0 if self._last is None else self._last.metrics_version)
        if not lines and (self._waits or unread < _COMMITS_UNREAD):
            return
        stored = self._last if self._waits else progress  # the next run reads again what waits
        metadata = {"billing": {"run_id": self._run_id, "place": None if stored is None else stored.to_metadata()}}
        transaction, table = Transaction(_APP, self._snapshot.version(BILLING_LINES) + 1), BILLING_LINES
        if lines:
            rows = [asdict(line) for line in lines]
            append_linked(self._lake, table, lambda _: rows, Step.BILLING_LINES, transaction=transaction, metadata=metadata)
        else:
            self._lake.append(table, table.schema.empty_table(), Step.BILLING_LINES, transaction=transaction, metadata=metadata)


def billed_through(settings: Settings) -> date | None:
    """Return the day before which all closed days are billed; None if nothing was posted."""
    lake = Lake(settings)
    last = _last_progress(lake) if lake.exists(BILLING_LINES) else None
    return None if last is None else last.billed_through


def nanos_to_micros(nanos: int) -> int:
    """Round to whole micros, half away from zero: 500 -> 1, 499 -> 0, -500 -> -1. The dbt macro of that name does the same."""
    micros = (abs(nanos) + 500) // 1000
    return micros if nanos >= 0 else -micros


def _split(run: str | None, nanos: int, kinds: dict[str, tuple[int, str | None]], *, is_alone: bool) -> Iterable[tuple[str, int]]:
    """Split a run's money by kind, because a run may repair and review the same campaign.

    `restatements` does not name the store: if a campaign has several, the kind that changed most gets the money.
    """
    if run is None:
        return [(_OWN, nanos)]
    if not kinds:
        return [(f"{_UNKNOWN}{run}", nanos)]
    ordered = sorted(kinds, key=lambda kind: (abs(kinds[kind][0]), kind))
    rest = {kind: kinds[kind][0] if is_alone else 0 for kind in ordered[:-1]}
    return [*((f"{kind}:{run}", money) for kind, money in rest.items()), (f"{ordered[-1]}:{run}", nanos - sum(rest.values()))]


def _changes(before: dict[str, int], after: dict[str, int]) -> list[tuple[tuple[str, str | None], int]]:
    """Return (reason, run) and the nanos by which the parts changed, in the order of the lines."""
    found: dict[tuple[str, str | None], int] = defaultdict(int)
    for part in before.keys() | after.keys():
        change = after.get(part, 0) - before.get(part, 0)
        kind, _, run = part.partition(":")
        if change and part == _OWN:  # only a correction removes a batch's own increments
            found["late" if change > 0 else "repair", None] += change
        elif change:
            found[_REASON_OF_KIND.get(kind, "repair"), run] += change
    return sorted(found.items(), key=lambda item: (_REASONS.index(item[0][0]), item[0][1] or ""))


def _among(days: list[date], column: str = "event_date") -> str:
    """Return a condition on a column of days. The bounds let DuckDB skip files; the list is exact."""
    listed = ", ".join(f"date '{day}'" for day in days)
    return f"{column} between date '{days[0]}' and date '{days[-1]}' and {column} in ({listed})"


def _last_progress(lake: Lake) -> _Progress | None:
    """Return the progress of the last posting; None if there was none, or the log no longer has it."""
    for commit in lake.log(BILLING_LINES).commits_backwards():
        if "billing" in commit.metadata:
            stored = commit.metadata["billing"]["place"]
            return (
                None if stored is None else _Progress(**stored | {"billed_through": date.fromisoformat(stored["billed_through"])})
            )
    return None
