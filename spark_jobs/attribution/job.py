"""Attribution: credits orders to the touches before them, and writes a new revision of an order if its credits change.

A run credits new and changed orders, and orders after a new or changed touch. The userMetadata of each commit to
`attributed_orders` stores how far the inputs were read, so a killed run has done all of its work or none. The indexes under
ADTALLY_HOME are derived from the tables.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.attribution.credits import credit, nested, sort_touches, validity
from spark_jobs.attribution.index import RowIndex
from spark_jobs.attribution.inputs import (
    ORDERS_SOURCE,
    REVISIONS_SOURCE,
    CannotFollow,
    Position,
    changes,
    fingerprints,
    index_folder,
    order_keys,
    position_of,
    table_parts,
    touches,
    updated_index,
)
from spark_jobs.attribution.rules import KIND, MODELS, AttributionRules, load_attribution_rules
from spark_jobs.config import Settings
from spark_jobs.corrections.run import finish_corrections, table_rows
from spark_jobs.lake.checked import DamagedError, Ints, Words
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.data_files import DataFile
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.locks import ATTRIBUTION, exclusive
from spark_jobs.lake.log import DeltaLog, commit_identity
from spark_jobs.lake.stamp import constant
from spark_jobs.lake.tables import ATTRIBUTED_ORDERS, EVENTS, ORDERS, RULE_SETS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.rules.exempt import are_exempt
from spark_jobs.rules.store import canonical, keep_rule_set, rule_set_hash, rule_sets_of
from spark_jobs.steps import Step
from spark_jobs.units import HourRange, to_micros

ORDERS_AT_ONCE = 20_000
_TOUCHES_AT_ONCE = 200_000
_METADATA = "attribution"  # the key of the progress in the userMetadata
_APP_ID = "adtally-attribution"  # its transaction has the version that a run decided on, so only one run per version is written
_FOREVER = 2**62
_TIME = pa.timestamp("us", "UTC")

# what each touch's row repeats of its order
_REPEATED = ("order_id", "user_id", "store_id", "currency", "total_micros")

# Why a run credits an order again. Of several causes the order gets the largest number.
_CAUSES = ("recount", "order_changed", "late_touch", "touch_invalid", "order_removed")
_RECOUNT, _ORDER, _TOUCH, _INVALID, _REMOVED = range(5)


@dataclass(frozen=True)
class AttributionReport:
    """The counts of one run. Each of the ``orders`` is credited, unattributed (without a touch) or cancelled.

    ``touches`` are those of the credited orders, ``revisions`` the new revisions of orders whose credits changed.
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
    """Credit the orders that changed since the last run or, with ``hours``, the orders with an order_time in these hours.

    An order keeps the rule set that first credited it; ``hours`` are credited by today's rules. An order with unchanged credits
    gets no new revision. Raises RuleFileError for wrong rules, BusyError if
    another attribution does not end in time.
    """
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
    """The positions up to which events and orders are processed."""

    events: Position
    orders: Position

    @classmethod
    def of(cls, log: DeltaLog, version: int) -> _Progress | None:
        """Return the progress that the newest commit of an attribution up to ``version`` stores."""
        for commit in log.commits_backwards(version):
            stored = commit.metadata.get(_METADATA)
            if stored is not None:
                return cls(Position(*stored["events"]), Position(*stored["orders"])) if stored else None
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
        # Users that all rule sets exempt have no touches in the index: one such id may have most of the events.
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
        is_anew = hours is not None
        parts = self._orders_of_hours(hours, upto) if hours is not None else self._changed_orders(done, upto)
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
        self._touch_index = updated_index(self._lake, self._touches, upto.events)
        self._order_index = updated_index(self._lake, ORDERS_SOURCE, upto.orders)
        self._revision_index = updated_index(self._lake, REVISIONS_SOURCE, self._base)

    def _orders_of_hours(self, hours: HourRange, upto: _Progress) -> Iterator[pa.Table]:
        start, end = to_micros(hours.start), to_micros(hours.end)
        for part in table_parts(self._lake, ORDERS_SOURCE, upto.orders.version, ("order_time", hours.start, hours.end)):
            at = part["time_us"].to_numpy()
            found = part.filter(pa.array((at >= start) & (at < end)))
            yield _with_cause(found, np.full(found.num_rows, _RECOUNT))

    def _changed_orders(self, done: _Progress | None, upto: _Progress) -> Iterator[pa.Table]:
        """Yield the orders to credit again, each once, with the cause. All orders, if the changes are unknown."""
        try:
            if done is None:
                raise CannotFollow
            yield self._changed_since(done, upto)
        except CannotFollow:
            self._has_news = True
            for part in table_parts(self._lake, ORDERS_SOURCE, upto.orders.version):
                yield _with_cause(part, np.full(part.num_rows, _RECOUNT))

    def _changed_since(self, done: _Progress, upto: _Progress) -> pa.Table:
        found = [self._order_index.schema.empty_table()]
        causes = [np.empty(0, dtype=np.int64)]
        for _, rows in changes(self._lake, self._touches, done.events, upto.events):
            self._has_news = True
            orders, cause = self._orders_after(rows)
            found.append(orders)
            causes.append(cause)
        for _, rows in changes(self._lake, ORDERS_SOURCE, done.orders, upto.orders):
            self._has_news = True
            found.append(rows)
            causes.append(np.full(rows.num_rows, _ORDER))
        orders = pa.concat_tables([part.select(found[0].schema.names).cast(found[0].schema) for part in found])
        # Of each order the row of the newest version, which is last, and the largest cause.
        ids, number = np.unique(orders["id"].to_numpy(), return_inverse=True)
        last, largest = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.int64)
        np.maximum.at(last, number, np.arange(orders.num_rows))
        np.maximum.at(largest, number, np.concatenate(causes))
        orders = orders.take(pa.array(last))
        largest[~_bools(orders["counts"])] = _REMOVED
        return _with_cause(orders, largest)

    def _orders_after(self, changed: pa.Table) -> tuple[pa.Table, Ints]:
        """Return the orders after changed touches, up to the longest window, and the causes."""
        low, high, at = (changed[name].to_numpy() for name in ("low", "high", "time_us"))
        lookback = max(rules.lookback_us for rules in self._rules.values())
        number, orders = self._order_index.between(low, high, at + 1, at + lookback + 1)
        cause = np.where(changed["counts"].to_numpy()[number], _TOUCH, _INVALID)
        kept = ~_bools(orders["is_cancelled"])
        return orders.filter(pa.array(kept)), cause[kept]

    def _revisions(self, orders: pa.Table, *, is_anew: bool) -> Iterator[pa.Table]:
        """Yield rows of `attributed_orders` for the orders whose credits differ from their newest revision.

        An order that a repair removed from `orders` loses its credits like a cancelled one.
        """
        orders = orders.combine_chunks()
        is_cancelled = pc.or_(orders["is_cancelled"], pc.equal(orders["cause"], _REMOVED))
        orders = orders.set_column(orders.schema.get_field_index("is_cancelled"), "is_cancelled", is_cancelled)
        before = _PreviousRevisions.of(self._revision_index, *order_keys(orders["order_id"]))
        names = np.array([self._today_name if is_anew or name is None else name for name in before.rule_set], dtype=object)
        for name in sorted(set(names.tolist())):
            of_rules = np.flatnonzero(names == name)
            for part in self._touched_orders(orders, of_rules, self._rules[name]):
                yield from self._revisions_by(name, orders, part, before)

    def _touched_orders(self, orders: pa.Table, chosen: Ints, rules: AttributionRules) -> Iterator[tuple[Ints, Ints, pa.Table]]:
        """Yield the ``chosen`` orders in parts with a bounded number of touches.

        A part has the indices of its orders, for each touch the index into these indices, and the touches.
        """
        placed = ~(_bools(orders["is_cancelled"]) | _bools(are_exempt(orders["user_id"], rules.exempt_users)))[chosen]
        asked = chosen[placed]
        low, high, at = (orders[name].to_numpy()[asked] for name in ("low", "high", "time_us"))
        number, found = self._touch_index.between(low, high, at - rules.lookback_us, at)
        if not rules.view_through:
            clicks = _bools(found["is_click"])
            if not clicks.all():
                number, found = number[clicks], found.filter(pa.array(clicks))
        order = np.flatnonzero(placed)[number]
        by = sort_touches(order, found["time_us"].to_numpy(), found["event_id"])
        if by is not None:
            order, found = order[by], found.take(pa.array(by))
        ends = np.cumsum(np.bincount(order, minlength=len(chosen)))
        start = touch = 0
        while start < len(chosen):
            end = max(start + 1, int(np.searchsorted(ends, touch + _TOUCHES_AT_ONCE, "right")))
            last = int(ends[min(end, len(chosen)) - 1])
            yield chosen[start:end], order[touch:last] - start, found.slice(touch, last - touch)
            start, touch = end, last

    def _revisions_by(
        self, name: str, orders: pa.Table, part: tuple[Ints, Ints, pa.Table], before: _PreviousRevisions
    ) -> Iterator[pa.Table]:
        """Yield the new rows of the orders of a part, credited by the rule set ``name``, and keep their keys for the index."""
        chosen, order, found = part
        of = orders.take(pa.array(chosen))
        number, rows = credited_rows(of, order, found, self._rules[name])
        self._count(of, number, rows)
        prints = fingerprints(rows, number)
        is_new = before.revision[chosen] == 0
        removed = of["cause"].to_numpy() == _REMOVED
        changed = (is_new & ~removed) | (~is_new & (prints != before.fingerprint[chosen]))
        if not changed.any():
            return
        revision = before.revision[chosen] + 1
        reasons = pa.array(self._reasons(of, before, chosen, name), pa.string())
        if not changed.all():
            at = np.flatnonzero(changed[number])
            rows, number = rows.take(pa.array(at)), number[at]
        yield table_rows(
            ATTRIBUTED_ORDERS,
            rows,
            revision=pa.array(revision[number]),
            reason=reasons.take(pa.array(number)),
            rule_set=name,
            attributed_at=to_micros(self.now),
            _run_id=self.run_id,
        )
        self._counts["revisions"] += int(changed.sum())
        revised = np.flatnonzero(changed)
        self._revised.append(
            pa.table(
                {
                    "low": before.low[chosen[revised]],
                    "high": before.high[chosen[revised]],
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
        cancelled = int(np.count_nonzero(_bools(orders["is_cancelled"])))
        touched = number[_bools(rows["touch_time"].is_valid())]
        credited = int(np.count_nonzero(np.bincount(touched)))
        self._counts["orders"] += orders.num_rows
        self._counts["credited"] += credited
        self._counts["cancelled"] += cancelled
        self._counts["unattributed"] += orders.num_rows - credited - cancelled
        self._counts["touches"] += len(touched)

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
        progress = {"events": astuple(done.events), "orders": astuple(done.orders)} if done else {}
        base = self._base.version
        self._lake.commit(
            ATTRIBUTED_ORDERS,
            Step.ATTRIBUTED_ORDERS,
            base=base,
            add=files,
            transaction=Transaction(_APP_ID, base),
            metadata={_METADATA: progress, "run_id": self.run_id},
            batch_id=0,
        )
        commit = self._lake.log(ATTRIBUTED_ORDERS).commit(base + 1)
        if commit is not None and commit.txn == (_APP_ID, base):  # else the next run reads it from the table
            schema = self._revision_index.schema
            rows = pa.concat_tables([schema.empty_table(), *(rows.cast(schema) for rows in self._revised)])
            try:
                self._revision_index.append(rows, base + 1, commit_identity(commit))
            except DamagedError:  # found while merging runs: the next run rebuilds the index
                shutil.rmtree(index_folder(self.settings))


@dataclass(frozen=True)
class _PreviousRevisions:
    """The newest revisions of some orders, in their order; 0 where there is none. ``low`` and ``high`` are the orders' keys."""

    low: Words
    high: Words
    revision: Ints
    fingerprint: Words
    rule_set: list[str | None]
    is_cancelled: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, index: RowIndex, low: Words, high: Words) -> _PreviousRevisions:
        number, found = index.between(low, high, np.zeros(len(low), dtype=np.int64), np.full(len(low), _FOREVER))
        size = len(low)
        made = cls(low, high, np.zeros(size, np.int64), np.zeros(size, np.uint64), [None] * size, np.zeros(size, bool))
        made.revision[number] = found["time_us"].to_numpy()  # in the order of revisions: the last one wins
        made.fingerprint[number] = found["fingerprint"].to_numpy()
        made.is_cancelled[number] = _bools(found["is_cancelled"])
        for order, name in zip(number.tolist(), found["rule_set"].to_pylist(), strict=True):
            made.rule_set[order] = name
        return made


def credited_rows(orders: pa.Table, order: Ints, found: pa.Table, rules: AttributionRules) -> tuple[Ints, pa.Table]:
    """Return rows of `attributed_orders` without the columns of the revision, and for each row the index of its order.

    ``found`` are touches sorted by (order, time, event_id), ``order`` has their indices into ``orders`` (rows of ORDERS_SOURCE).
    Touches outside of all windows have no row; an order without a touch has one row.
    """
    clicks, times = _bools(found["is_click"]), found["time_us"].to_numpy()
    made = credit(orders["time_us"].to_numpy(), orders["total_micros"].to_numpy(), order, times, clicks, rules)
    inside = made.inside
    is_credited = inside.any(axis=1)
    if not is_credited.all():  # a touch outside of all windows
        order, inside = order[is_credited], inside[is_credited]
        found = found.filter(pa.array(is_credited))
    touched = np.bincount(order, minlength=orders.num_rows)
    bare = np.flatnonzero(touched == 0)
    number = np.concatenate([order, bare])
    of = orders.select((*_REPEATED, "is_cancelled", "time_us")).take(pa.array(number))
    windows = np.broadcast_to(np.array(rules.window_days, dtype=np.int64), (len(number), len(rules.window_days)))
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        **{name: of[name] for name in _REPEATED},
        "status": pc.if_else(of["is_cancelled"], "cancelled", "placed"),
        "order_time": of["time_us"].cast(_TIME),
        "touches": pa.array(touched[number]),
        "window_days": nested(windows),
    }
    of_touch = {
        "touch_event_id": found["event_id"],
        "touch_type": pc.if_else(found["is_click"], "click", "impression"),
        "touch_time": found["time_us"].cast(_TIME),
        "campaign_id": found["campaign_id"],
        "ad_id": found["ad_id"],
    }
    bitmap = validity(inside)
    for model in MODELS:
        for unit, values in (("micros", made.micros[model]), ("weights", made.weights[model])):
            of_touch[f"{model}_{unit}"] = nested(values if is_credited.all() else values[is_credited], bitmap)
    for name, column in of_touch.items():
        parts = [*(column.chunks if isinstance(column, pa.ChunkedArray) else [column])]
        columns[name] = pa.chunked_array([*parts, pa.nulls(len(bare), column.type)])
    return number, pa.table(columns)


def _bools(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    values: npt.NDArray[np.bool_] = column.to_numpy(zero_copy_only=False)
    return values


def _with_cause(orders: pa.Table, cause: Ints) -> pa.Table:
    return orders.append_column("cause", pa.array(cause.astype(np.int64)))
