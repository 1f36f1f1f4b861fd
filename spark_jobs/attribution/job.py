"""Attribution: credits orders to the touches before them, and writes a new revision of an order if its credits change.

A run looks at the orders that changed since the last one: new and changed orders, and orders after a new or changed touch. Each
commit to `attributed_orders` notes in its userMetadata how far the inputs were read, so a killed run has done all of it or nothing.
The indexes under ADTALLY_HOME are derived from the tables.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.attribution.credits import credit, nested, sort_touches
from spark_jobs.attribution.index import RowIndex
from spark_jobs.attribution.inputs import (
    ORDERS_SOURCE,
    REVISIONS_SOURCE,
    CannotFollow,
    Position,
    bring_to,
    changes,
    fingerprints,
    index_folder,
    order_keys,
    position_of,
    table_parts,
    touches,
)
from spark_jobs.attribution.rules import KIND, MODELS, AttributionRules, load_attribution_rules
from spark_jobs.config import Settings
from spark_jobs.corrections.run import finish_corrections
from spark_jobs.lake.checked import DamagedError
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.data_files import DataFile
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.locks import ATTRIBUTION, exclusive
from spark_jobs.lake.log import DeltaLog, commit_identity
from spark_jobs.lake.roots import require_local
from spark_jobs.lake.stamp import constant
from spark_jobs.lake.tables import ATTRIBUTED_ORDERS, EVENTS, ORDERS, RULE_SETS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.rules.exempt import are_exempt
from spark_jobs.rules.store import canonical, keep_rule_set, rule_set_hash, rule_sets_of
from spark_jobs.steps import Step
from spark_jobs.units import HourRange, to_micros

ORDERS_AT_ONCE = 20_000
_TOUCHES_AT_ONCE = 200_000
_METADATA = "attribution"  # in the userMetadata
# txn: with the version of the table that a run was decided on, so of two that were decided on the same only one is written
_APP_ID = "adtally-attribution"
_FOREVER = 2**62
_TIME = pa.timestamp("us", "UTC")
Ints = npt.NDArray[np.int64]

# why an order is looked at, the weightier the larger: an order has the largest of its causes
_CAUSES = ("recount", "order_changed", "late_touch", "touch_invalid", "order_removed")
_RECOUNT, _ORDER, _TOUCH, _INVALID, _REMOVED = range(5)


@dataclass(frozen=True)
class AttributionReport:
    """What one run did. ``orders`` are those that it looked at: credited, without a touch, or cancelled.

    ``touches`` are those of the credited orders; ``revisions`` were written, for the orders whose credits came out otherwise.
    """

    run_id: str
    orders: int
    credited: int
    unattributed: int
    cancelled: int
    revisions: int
    touches: int
    seconds: float


def attribute(
    settings: Settings,
    hours: HourRange | None = None,
    *,
    run_id: str | None = None,
    now: datetime | None = None,
    progress: Callable[[str], None] | None = None,
) -> AttributionReport:
    """Credit the orders concerned by what came since the last run; or, with ``hours``, those whose order_time lies in them.

    An order keeps the rule set that it was first credited by; a range is credited anew by today's. An order whose credits come out
    the same gets no new revision. Raises UsageError for a lakehouse that is not a local path, RuleFileError where the rules are
    wrong, BusyError where another attribution does not end in time.
    """
    require_local(settings, "attribution")
    finish_corrections(settings)
    run_id, now = run_id or uuid.uuid4().hex, now or datetime.now(UTC)
    with exclusive(settings, ATTRIBUTION):
        try:
            return _AttributionRun(settings, run_id, now, progress).run(hours)
        except DamagedError as damage:  # nothing is committed yet
            if progress is not None:
                progress(f"the attribution index is rebuilt: {damage}")
            shutil.rmtree(index_folder(settings))
            return _AttributionRun(settings, run_id, now, progress).run(hours)


@dataclass(frozen=True)
class _Progress:
    """Up to where events and orders are processed."""

    events: Position
    orders: Position

    def to_metadata(self) -> dict[str, object]:
        return {name: [at.table_id, at.version] for name, at in (("events", self.events), ("orders", self.orders))}

    @classmethod
    def of(cls, log: DeltaLog, version: int) -> _Progress | None:
        """What the newest commit of an attribution up to ``version`` says."""
        for commit in log.commits_backwards(version):
            noted = commit.metadata.get(_METADATA)
            if noted is not None:
                return cls(Position(*noted["events"]), Position(*noted["orders"])) if noted else None
        return None


class _AttributionRun:
    """One call, under the lock."""

    def __init__(self, settings: Settings, run_id: str, now: datetime, progress: Callable[[str], None] | None) -> None:
        self._lake = Lake(settings)
        if not all(self._lake.exists(table) for table in (EVENTS, ORDERS, RULE_SETS, ATTRIBUTED_ORDERS)):
            ensure_tables(settings)
        self.settings, self.run_id, self.now = settings, run_id, now
        self._progress = progress or (lambda _: None)
        self._started = time.monotonic()
        self._base = position_of(self._lake, ATTRIBUTED_ORDERS)
        self._today = load_attribution_rules(settings)
        self._today_name = rule_set_hash(KIND, canonical(self._today))
        self._rules = {**rule_sets_of(settings, KIND, AttributionRules), self._today_name: self._today}
        # touches of a user that all rule sets exempt are not even looked up: one such id may have most of the events
        exempt = frozenset.intersection(*(frozenset(rules.exempt_users) for rules in self._rules.values()))
        with_impressions = any(rules.view_through for rules in self._rules.values())
        self._touches = touches(with_impressions=with_impressions, exempt_users=exempt)
        self._counts = dict.fromkeys(("orders", "credited", "unattributed", "cancelled", "revisions", "touches"), 0)
        self._revised: list[pa.Table] = []
        self._has_news = False

    def run(self, hours: HourRange | None) -> AttributionReport:
        done = _Progress.of(self._lake.log(ATTRIBUTED_ORDERS), self._base.version)
        upto = _Progress(position_of(self._lake, EVENTS), position_of(self._lake, ORDERS))
        if hours is None and done == upto:
            return self._report()
        self._bring_indexes(upto)
        parts = self._of_hours(hours, upto) if hours is not None else self._concerned(done, upto)
        is_anew = hours is not None
        with self._lake.writer(ATTRIBUTED_ORDERS) as writer:
            for part in parts:
                for start in range(0, part.num_rows, ORDERS_AT_ONCE):
                    for rows in self._revisions(part.slice(start, ORDERS_AT_ONCE), is_anew=is_anew):
                        writer.write(rows)
                    self._progress(f"{self._counts['orders']:,} orders")
        if writer.files or (self._has_news and not is_anew):
            self._commit(writer.files, done if is_anew else upto)
        return self._report()

    def _report(self) -> AttributionReport:
        return AttributionReport(run_id=self.run_id, seconds=time.monotonic() - self._started, **self._counts)

    def _bring_indexes(self, upto: _Progress) -> None:
        self._progress("indexes")
        self._touch_index = self._touches.index(self.settings)
        self._order_index = ORDERS_SOURCE.index(self.settings)
        self._revision_index = REVISIONS_SOURCE.index(self.settings)
        bring_to(self._lake, self._touches, self._touch_index, upto.events)
        bring_to(self._lake, ORDERS_SOURCE, self._order_index, upto.orders)
        bring_to(self._lake, REVISIONS_SOURCE, self._revision_index, self._base)

    def _of_hours(self, hours: HourRange, upto: _Progress) -> Iterator[pa.Table]:
        start, end = to_micros(hours.start), to_micros(hours.end)
        for part in table_parts(self._lake, ORDERS_SOURCE, upto.orders.version, ("order_time", hours.start, hours.end)):
            at = part["time_us"].to_numpy()
            found = part.filter(pa.array((at >= start) & (at < end)))
            yield _with_cause(found, np.full(found.num_rows, _RECOUNT))

    def _concerned(self, done: _Progress | None, upto: _Progress) -> Iterator[pa.Table]:
        """The orders to look at, each once, with the cause. All, where it cannot be said what changed."""
        try:
            if done is None:
                raise CannotFollow
            found = self._concerned_since(done, upto)
        except CannotFollow:
            self._has_news = True
            for part in table_parts(self._lake, ORDERS_SOURCE, upto.orders.version):
                yield _with_cause(part, np.full(part.num_rows, _RECOUNT))
            return
        if found.num_rows:
            yield found

    def _concerned_since(self, done: _Progress, upto: _Progress) -> pa.Table:
        found = [self._order_index.schema.empty_table()]
        causes = [np.empty(0, dtype=np.int64)]
        for _, rows in changes(self._lake, self._touches, done.events, upto.events):
            self._has_news = True
            orders, cause = self._behind(rows)
            found.append(orders)
            causes.append(cause)
        for _, rows in changes(self._lake, ORDERS_SOURCE, done.orders, upto.orders):
            self._has_news = True
            found.append(rows)
            causes.append(np.full(rows.num_rows, _ORDER))
        orders, cause = (
            pa.concat_tables([part.select(found[0].schema.names).cast(found[0].schema) for part in found]),
            np.concatenate(causes),
        )
        # of an order the row of the latest version, which comes last, and the weightiest cause
        ids, number = np.unique(orders["id"].to_numpy(), return_inverse=True)
        last, weightiest = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.int64)
        np.maximum.at(last, number, np.arange(orders.num_rows))
        np.maximum.at(weightiest, number, cause)
        orders = orders.take(pa.array(last))
        removed = ~orders["counts"].to_numpy(zero_copy_only=False)
        weightiest[removed] = _REMOVED
        return _with_cause(orders, weightiest)

    def _behind(self, changed: pa.Table) -> tuple[pa.Table, Ints]:
        """The orders that lie behind changed touches by not more than the longest window, and the causes."""
        low, high, at = (changed[name].to_numpy() for name in ("low", "high", "time_us"))
        lookback = max(rules.lookback_us for rules in self._rules.values())
        number, orders = self._order_index.between(low, high, at + 1, at + lookback + 1)
        cause = np.where(changed["counts"].to_numpy()[number], _TOUCH, _INVALID)
        kept = ~orders["is_cancelled"].to_numpy(zero_copy_only=False)
        return orders.filter(pa.array(kept)), cause[kept]

    def _revisions(self, orders: pa.Table, *, is_anew: bool) -> Iterator[pa.Table]:
        """Rows of `attributed_orders` for those of some orders whose credits are not what their latest revision says.

        An order that a repair has removed from `orders` loses its credits as a cancelled one does.
        """
        orders = _removed_as_cancelled(orders.combine_chunks())
        low, high = order_keys(orders["order_id"])
        before = _PreviousRevisions.of(self._revision_index, low, high)
        names = np.array([self._today_name if is_anew or name is None else name for name in before.rule_set], dtype=object)
        for name in sorted(set(names.tolist())):
            of_rules = np.flatnonzero(names == name)
            for chosen in self._cut(orders, of_rules, self._rules[name]):
                yield from self._of_rules(orders, chosen, before, name, (low, high))

    def _cut(self, orders: pa.Table, chosen: Ints, rules: AttributionRules) -> Iterator[tuple[Ints, Ints, pa.Table]]:
        """Orders, a bounded number of touches at a time: indices of the orders, per touch the index into those, and the touches."""
        exempt = are_exempt(orders["user_id"], rules.exempt_users).to_numpy(zero_copy_only=False)
        placed = ~(orders["is_cancelled"].to_numpy(zero_copy_only=False) | exempt)[chosen]
        asked = chosen[placed]
        low, high, at = (orders[name].to_numpy()[asked] for name in ("low", "high", "time_us"))
        number, found = self._touch_index.between(low, high, at - rules.lookback_us, at)
        if not rules.view_through:
            clicks = found["is_click"].to_numpy(zero_copy_only=False)
            number, found = number[clicks], found.filter(pa.array(clicks))
        order = np.flatnonzero(placed)[number]
        by = sort_touches(order, found["time_us"].to_numpy(), found["event_id"])
        order, found = order[by], found.take(pa.array(by))
        ends = np.cumsum(np.bincount(order, minlength=len(chosen)))
        start = touch = 0
        while start < len(chosen):
            end = max(start + 1, int(np.searchsorted(ends, touch + _TOUCHES_AT_ONCE, "right")))
            last = int(ends[min(end, len(chosen)) - 1])
            yield chosen[start:end], order[touch:last] - start, found.slice(touch, last - touch)
            start, touch = end, last

    def _of_rules(
        self,
        orders: pa.Table,
        cut: tuple[Ints, Ints, pa.Table],
        before: _PreviousRevisions,
        name: str,
        keys: tuple[npt.NDArray[np.uint64], ...],
    ) -> Iterator[pa.Table]:
        chosen, order, found = cut
        of = orders.take(pa.array(chosen))
        number, rows = credited_rows(of, order, found, self._rules[name])
        self._count(of, number, rows)
        prints = fingerprints(rows, number)
        is_new = before.revision[chosen] == 0
        removed = of["cause"].to_numpy() == _REMOVED
        changed = (is_new & ~removed) | (~is_new & (prints != before.fingerprint[chosen]))
        if not changed.any():
            return
        at = np.flatnonzero(changed[number])
        revision = before.revision[chosen] + 1
        reasons = pa.array(self._reasons(of, before, chosen, name), pa.string())
        rows, number = rows.take(pa.array(at)), number[at]
        yield _whole(
            rows,
            {
                "revision": pa.array(revision[number]),
                "reason": reasons.take(pa.array(number)),
                "rule_set": constant(name, len(number), pa.string()),
                "attributed_at": constant(to_micros(self.now), len(number), _TIME),
                "_run_id": constant(self.run_id, len(number), pa.string()),
            },
        )
        self._counts["revisions"] += int(changed.sum())
        revised = np.flatnonzero(changed)
        self._revised.append(
            pa.table(
                {
                    "low": keys[0][chosen[revised]],
                    "high": keys[1][chosen[revised]],
                    "time_us": revision[revised],
                    "id": np.zeros(len(revised), dtype=np.uint64),
                    "counts": np.ones(len(revised), dtype=bool),
                    "fingerprint": prints[revised],
                    "rule_set": constant(name, len(revised), pa.string()),
                    "is_cancelled": of["is_cancelled"].take(pa.array(revised)),
                }
            )
        )

    def _count(self, orders: pa.Table, number: Ints, rows: pa.Table) -> None:
        cancelled = int(np.count_nonzero(orders["is_cancelled"].to_numpy(zero_copy_only=False)))
        has_touch = number[rows["touch_time"].is_valid().to_numpy(zero_copy_only=False)]
        credited = len(np.unique(has_touch))
        found = {
            "orders": orders.num_rows,
            "credited": credited,
            "cancelled": cancelled,
            "unattributed": orders.num_rows - credited - cancelled,
            "touches": len(has_touch),
        }
        for name, count in found.items():
            self._counts[name] += count

    def _reasons(self, orders: pa.Table, before: _PreviousRevisions, chosen: Ints, name: str) -> list[str]:
        cancelled = orders["is_cancelled"].to_pylist()
        late, cause = orders["is_late"].to_pylist(), orders["cause"].to_pylist()
        made = []
        for number, at in enumerate(chosen.tolist()):
            if cause[number] == _REMOVED:
                made.append(_CAUSES[_REMOVED])
            elif before.revision[at] == 0:
                made.append("late_order" if late[number] else "order")
            elif cancelled[number] and not before.is_cancelled[at]:
                made.append("cancelled")
            else:
                made.append("rules" if before.rule_set[at] != name else _CAUSES[cause[number]])
        return made

    def _commit(self, files: list[DataFile], done: _Progress | None) -> None:
        """Commit the revisions and how far the inputs were read, in one commit."""
        if files and any(table["rule_set"][0].as_py() == self._today_name for table in self._revised):
            keep_rule_set(self.settings, KIND, self._today, self.now)
        metadata = {_METADATA: done.to_metadata() if done else {}, "run_id": self.run_id}
        base = self._base.version
        transaction = Transaction(_APP_ID, base)
        self._lake.commit(
            ATTRIBUTED_ORDERS, Step.ATTRIBUTED_ORDERS, base=base, add=files, transaction=transaction, metadata=metadata, batch_id=0
        )
        commit = self._lake.log(ATTRIBUTED_ORDERS).commit(base + 1)
        if commit is not None and commit.txn == (_APP_ID, base):  # else the next run reads it from the table
            schema = self._revision_index.schema
            rows = pa.concat_tables([schema.empty_table(), *(rows.cast(schema) for rows in self._revised)])
            try:
                self._revision_index.append(rows, base + 1, commit_identity(commit))
            except DamagedError:  # found while runs were merged: the next run builds it again
                shutil.rmtree(index_folder(self.settings))


@dataclass(frozen=True)
class _PreviousRevisions:
    """The latest revisions of some orders, in their order; 0 where there is none."""

    revision: Ints
    fingerprint: npt.NDArray[np.uint64]
    rule_set: list[str | None]
    is_cancelled: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, index: RowIndex, low: npt.NDArray[np.uint64], high: npt.NDArray[np.uint64]) -> _PreviousRevisions:
        number, found = index.between(low, high, np.zeros(len(low), dtype=np.int64), np.full(len(low), _FOREVER))
        made = cls(np.zeros(len(low), np.int64), np.zeros(len(low), np.uint64), [None] * len(low), np.zeros(len(low), bool))
        made.revision[number] = found["time_us"].to_numpy()  # by revision: the last one stays
        made.fingerprint[number] = found["fingerprint"].to_numpy()
        made.is_cancelled[number] = found["is_cancelled"].to_numpy(zero_copy_only=False)
        for order, name in zip(number.tolist(), found["rule_set"].to_pylist(), strict=True):
            made.rule_set[order] = name
        return made


def credited_rows(orders: pa.Table, order: Ints, found: pa.Table, rules: AttributionRules) -> tuple[Ints, pa.Table]:
    """Rows of `attributed_orders`, without what is of the revision, and for each the index of its order.

    ``found`` are touches sorted by (order, time, event_id) and ``order`` their indices into ``orders`` (rows as ORDERS_SOURCE gives
    them). Touches that count in no window are left out; an order without any has one row without a touch.
    """
    clicks = found["is_click"].to_numpy(zero_copy_only=False)
    made = credit(
        orders["time_us"].to_numpy(), orders["total_micros"].to_numpy(), order, found["time_us"].to_numpy(), clicks, rules
    )
    counts = made.inside.any(axis=1)
    if not counts.all():
        at = np.flatnonzero(counts)
        order, found, inside = order[at], found.take(pa.array(at)), made.inside[at]
    else:
        at, inside = np.arange(len(order)), made.inside
    touched = np.bincount(order, minlength=orders.num_rows)
    bare = np.flatnonzero(touched == 0)
    number = np.concatenate([order, bare])
    of, touch = (
        orders.take(pa.array(number)),
        found.take(pa.array(np.arange(len(number)), mask=np.arange(len(number)) >= len(order))),
    )
    windows = np.broadcast_to(np.array(rules.window_days, dtype=np.int64), (len(number), len(rules.window_days)))
    is_click = touch["is_click"].combine_chunks()
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        **{name: of[name] for name in ("order_id", "user_id", "store_id", "currency", "total_micros")},
        "status": pa.array(
            np.array(["placed", "cancelled"], dtype=object)[of["is_cancelled"].to_numpy(zero_copy_only=False).astype(int)]
        ),
        "order_time": of["time_us"].cast(_TIME),
        "touch_event_id": touch["event_id"],
        "touch_type": pa.DictionaryArray.from_arrays(is_click.cast(pa.int8()), pa.array(["impression", "click"])).cast(pa.string()),
        "touch_time": touch["time_us"].cast(_TIME),
        "campaign_id": touch["campaign_id"],
        "ad_id": touch["ad_id"],
        "touches": pa.array(touched[number]),
        "window_days": nested(windows, np.ones_like(windows, dtype=bool)),
    }
    for model in MODELS:
        for unit, values in (("micros", made.micros[model][at]), ("weights", made.weights[model][at])):
            lists = nested(values, inside)
            columns[f"{model}_{unit}"] = pa.concat_arrays([lists, pa.nulls(len(bare), lists.type)])
    return number, pa.table(columns)


def _whole(rows: pa.Table, more: dict[str, pa.Array]) -> pa.Table:
    columns = {**{name: rows[name] for name in rows.column_names}, **more}
    return pa.table([columns[field.name].cast(field.type) for field in ATTRIBUTED_ORDERS.schema], schema=ATTRIBUTED_ORDERS.schema)


def _removed_as_cancelled(orders: pa.Table) -> pa.Table:
    removed = pa.array(orders["cause"].to_numpy() == _REMOVED)
    at = orders.schema.get_field_index("is_cancelled")
    return orders.set_column(at, "is_cancelled", pc.or_(orders["is_cancelled"], removed))


def _with_cause(orders: pa.Table, cause: Ints) -> pa.Table:
    return orders.append_column("cause", pa.array(cause.astype(np.int64)))
