"""What must be true of the tables of a home: its invariants, and its books against those of the oracle.

Times are microseconds since 1970, as `Reader.dicts` gives them. Each check raises Violation, which names the invariant.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import duckdb

from services.simulator.chaos import oracle
from services.simulator.chaos.oracle import Books
from services.simulator.credit import MODELS, WINDOWS, FinalOrder, Touch, credit_orders

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_BATCH = ("_query_id", "_batch_id")
_MINUTE = ("event_minute", *oracle.MINUTE_KEYS)
_MEASURES = oracle.MINUTE_MEASURES
_MARKS = ("spend_nanos", "invalid_spend_nanos", "invalid_traffic_rule")
_COUNTS = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "unpriced")
_MARKED_COUNTS = ("invalid_traffic", "spend_nanos")
_LEDGER_KEY = ("_query_id", "_batch_id", "_run_id", "stream", "source", "region", "event_hour")


class Violation(AssertionError):
    """An invariant does not hold. ``invariant`` is its name."""

    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(f"{invariant}: {message}")
        self.invariant = invariant


class Reader(Protocol):
    """Reads the tables of a home."""

    def dicts(self, table: str, columns: str) -> list[dict[str, Any]]:
        """Return rows as dicts; ``columns`` are names with commas between them. Times are microseconds since 1970."""


def require(holds: object, invariant: str, message: object) -> None:
    """Raise Violation if something does not hold."""
    if not holds:
        raise Violation(invariant, str(message))


def _us(moment: datetime | str | None) -> int | str | None:
    return (moment - _EPOCH) // _MICROSECOND if isinstance(moment, datetime) else moment


def _as_oracle(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a table in the form of the oracle's."""
    made = {**row, "source": (row["source_file"], row["source_line"])}
    for name in ("received_at", "cancelled_at"):
        if row["ingested_at"] is not None and made.get(name) == row["ingested_at"]:
            made[name] = oracle.INGESTED
    return {name: value for name, value in made.items() if name not in ("source_file", "source_line", "ingested_at")}


def _expected(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _us(value) if isinstance(value, datetime) else value for name, value in row.items()}


def _agree(what: str, got: dict[Any, Any], expected: dict[Any, Any], keys: Collection[Any] | None = None) -> None:
    """Compare two dicts at ``keys``, by default at all keys of both; show the first entries that differ."""
    compared = {**expected, **got}.keys() if keys is None else keys
    wrong = [(key, got.get(key), expected.get(key)) for key in compared if got.get(key) != expected.get(key)]
    shown = [f"{key}:\n  got      {found}\n  expected {wanted}" for key, found, wanted in wrong[:4]]
    require(not wrong, what, "\n".join([f"{len(wrong)} differ", *shown]))


def _by(what: str, rows: list[dict[str, Any]], *key: str) -> dict[Any, dict[str, Any]]:
    """Return rows by their key, which must be unique."""
    made = {tuple(row[name] for name in key) if len(key) > 1 else row[key[0]]: row for row in rows}
    if len(made) < len(rows):
        counts = Counter(tuple(row[name] for name in key) for row in rows)
        require(False, what, f"{key} is not unique: {[one for one, count in counts.most_common(3) if count > 1]}")
    return made


def _without_marks(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event without what a review decides: only the sum of its two costs remains."""
    kept = {name: value for name, value in event.items() if name not in (*_MARKS, "invalid_traffic_rules")}
    return {**kept, "cost": event["spend_nanos"] + event["invalid_spend_nanos"]}


def check_events(reader: Reader, books: Books, *, marks: bool = True, at_least: Collection[str] | None = None) -> None:
    """Compare events column by column. With ``at_least`` only these ids must be there; all rows must be those of the books."""
    payload = ", ".join((*oracle.EVENT_IDS, *oracle.EVENT_TEXTS))
    columns = f"{payload}, event_type, event_time, received_at, region, price_micros, currency, billing_model, is_late"
    rows = reader.dicts("events", f"{columns}, {', '.join(_MARKS)}, invalid_traffic_rules, source_file, source_line, ingested_at")
    got = _by("events", [_as_oracle(row) for row in rows], "event_id")
    expected = {name: _expected(row) for name, row in books.events.items()}
    if not marks:
        got = {name: _without_marks(row) for name, row in got.items()}
        expected = {name: _without_marks(row) for name, row in expected.items()}
    _agree("events", got, expected, None if at_least is None else {*got, *at_least})


def check_orders(reader: Reader, books: Books) -> None:
    """Compare orders column by column."""
    columns = (
        "order_id, order_time, received_at, region, user_id, store_id, total_micros, currency, status, cancelled_at, has_placed"
    )
    orders = reader.dicts("orders", f"{columns}, is_late, source_file, source_line, ingested_at")
    for row in orders:
        # a row keeps the time of the batch that changed it last, so this is all that a time of ingestion can be held to
        expected = books.orders.get(row["order_id"], {})
        row["ingested_at"] = None
        for name in ("received_at", "cancelled_at"):
            if expected.get(name) == oracle.INGESTED and row[name] is not None:
                row[name] = oracle.INGESTED
    got = _by("orders", [_as_oracle(row) for row in orders], "order_id")
    _agree("orders", got, {name: _expected(row) for name, row in books.orders.items()})


def check_accepted(reader: Reader, books: Books) -> None:
    """Compare events and orders column by column."""
    check_events(reader, books)
    check_orders(reader, books)


def check_refused(reader: Reader, books: Books, *, times: int | None = 1) -> None:
    """Compare rejected and conflicting records by file and line, their bytes, and whom a conflict lost to.

    ``times``: how often a record may stand there, once for each checkpoint that read it; None: at least once. Tokens stand for the
    ids of the people who were erased; that no id is left is the proof of the erasure itself.
    """
    columns = "source_file, source_line, outcome, raw, raw_encoding, reason_codes, record_id, fingerprint, accepted_fingerprint"
    tables = {table: reader.dicts(table, f"{columns}, _query_id") for table in ("rejected_events", "rejected_orders")}
    rows = [row for found in tables.values() for row in found]
    by_query = _by("refused", rows, "source_file", "source_line", "_query_id")
    if times == 1:
        require(len({key[:2] for key in by_query}) == len(rows), "refused", "a record stands there twice")

    def raw(row: dict[str, Any]) -> bytes:
        found: bytes = base64.b64decode(row["raw"]) if row["raw_encoding"] == "base64" else row["raw"].encode()
        for user_id, token in books.tokens.items():
            found = found.replace(token.encode(), user_id.encode())
        return found

    got = {(file, line): (row["outcome"], raw(row)) for (file, line, _), row in by_query.items()}
    _agree("refused", got, dict(books.refused))
    require(all(row["reason_codes"] for row in rows), "refused", "a record without a reason")
    holders = {row["event_id"]: f"{row['fingerprint'] % 2**64:016x}" for row in reader.dicts("events", "event_id, fingerprint")}
    for row in tables["rejected_events"]:
        if row["outcome"] == "conflict":
            accepted = row["accepted_fingerprint"]
            require(accepted == holders.get(row["record_id"]) != row["fingerprint"], "refused", f"the fingerprints of {row}")


def check_conservation(reader: Reader) -> None:
    """Check the law of each row of the ledger, and that its key is unique."""
    for row in _by("ledger", reader.dicts("batch_ledger", ", ".join((*_LEDGER_KEY, *_COUNTS))), *_LEDGER_KEY).values():
        ends = row["accepted"] + row["duplicate"] + row["conflict"] + row["rejected"]
        require(row["offered"] == ends, "conservation", row)
        if row["_run_id"] is None:
            require(max(row["late"], row["unpriced"]) <= row["accepted"], "conservation", row)


def check_ledger(reader: Reader, books: Books, *, marks: bool = True, offered: bool = True) -> None:
    """Compare the ledger's sums per stream, region and event hour. Without ``offered`` only those of accepted records."""
    check_conservation(reader)
    counts = _COUNTS if offered else ("accepted", "late", "unpriced")
    measures = (*counts, *(_MARKED_COUNTS if marks else ()))
    sums: dict[tuple[str, str, int | None], Counter[str]] = {}
    received: dict[tuple[str, str, int | None], int] = {}
    for row in reader.dicts("batch_ledger", f"stream, region, event_hour, {', '.join(measures)}, max_received_at"):
        cell = (row["stream"], row["region"], row["event_hour"])
        sums.setdefault(cell, Counter()).update({name: row[name] for name in measures})
        if row["max_received_at"] is not None:
            received[cell] = max(received.get(cell, row["max_received_at"]), row["max_received_at"])
    expected = {
        (stream, region, _us(hour)): {name: cell[name] for name in measures if cell[name]}
        for (stream, region, hour), cell in books.ledger.items()
    }
    got = {cell: {name: found[name] for name in measures if found[name]} for cell, found in sums.items()}
    _agree("ledger", {cell: kept for cell, kept in got.items() if kept}, {cell: kept for cell, kept in expected.items() if kept})
    latest: dict[tuple[str, str, Any], list[Any]] = {}
    for event in books.events.values():
        latest.setdefault(("events", event["region"], _us(oracle.hour_of(event["event_time"]))), []).append(event["received_at"])
    for cell, moments in latest.items():
        if oracle.INGESTED not in moments and offered:
            require(received.get(cell) == _us(max(moments)), "ledger", f"max_received_at of {cell}")


def check_minutes(reader: Reader, books: Books, *, marks: bool = True) -> None:
    """Compare the increments' sums per minute and key."""

    def shown(measures: list[int]) -> list[int]:
        return list(measures) if marks else [measures[0] + measures[2], measures[1] + measures[3], measures[4] + measures[5]]

    totals: dict[Any, list[int]] = {}
    for row in reader.dicts("minute_metrics", ", ".join((*_MINUTE, *_MEASURES))):
        cell = totals.setdefault(tuple(row[name] for name in _MINUTE), [0] * len(_MEASURES))
        cell[:] = [before + row[name] for before, name in zip(cell, _MEASURES, strict=True)]
    got = {key: shown(measures) for key, measures in totals.items()}
    expected = {(_us(minute), *key): shown(measures) for (minute, *key), measures in books.minutes.items()}
    nothing = shown([0] * len(_MEASURES))
    _agree("minutes", {key: cell for key, cell in got.items() if cell != nothing}, expected)


def check_increments(reader: Reader, *, corrected: bool = False) -> None:
    """Check that each batch has one increment a key, of the events of that batch, under the name that batch and key give it.

    ``corrected``: corrections have added increments under names of their own, so only the sums are compared.
    """
    rows = reader.dicts("minute_metrics", ", ".join(("record_uuid", *_BATCH, *_MINUTE, *_MEASURES)))
    _by("increments", rows, "record_uuid")
    increments: dict[Any, list[int]] = {}
    for row in rows:
        minute = _EPOCH + timedelta(microseconds=row["event_minute"])
        named = oracle.record_uuid(row["_query_id"], row["_batch_id"], minute, [row[name] for name in oracle.MINUTE_KEYS])
        require(corrected or row["record_uuid"] == named, "increments", f"the name of {row}")
        cell = increments.setdefault(tuple(row[name] for name in (*_BATCH, *_MINUTE)), [0] * len(_MEASURES))
        cell[:] = [before + row[name] for before, name in zip(cell, _MEASURES, strict=True)]
    of_events: dict[Any, list[int]] = {}
    for event in reader.dicts("events", ", ".join((*_BATCH, "event_time", *oracle.MINUTE_KEYS, "event_type", *_MARKS))):
        minute_us = event["event_time"] // 60_000_000 * 60_000_000
        key = (*(event[name] for name in _BATCH), minute_us, *(event[name] for name in oracle.MINUTE_KEYS))
        cell = of_events.setdefault(key, [0] * len(_MEASURES))
        cell[2 * (event["invalid_traffic_rule"] is not None) + (event["event_type"] == "click")] += 1
        cell[4] += event["spend_nanos"]
        cell[5] += event["invalid_spend_nanos"]
    _agree("increments", {key: cell for key, cell in increments.items() if any(cell)} if corrected else increments, of_events)


def check_credits(reader: Reader, books: Books) -> None:
    """Compare the micros that each campaign is credited with, by model and window, with those of the simulator's own credit."""
    touches: dict[tuple[str, str], list[Touch]] = {}
    for event in books.events.values():
        if event["event_type"] == "click" and event["invalid_traffic_rule"] is None:
            at = (event["event_time"] - _EPOCH) // _MICROSECOND
            touches.setdefault((event["user_id"], event["store_id"]), []).append(Touch(at, event["event_id"], event["campaign_id"]))
    orders = [
        FinalOrder(
            order["order_id"],
            (order["order_time"] - _EPOCH) // _MICROSECOND,
            order["user_id"],
            order["store_id"],
            order["total_micros"],
            order["currency"],
            order["status"] == "placed",
        )
        for order in books.orders.values()
    ]
    names = ("model", "window_days", "campaign_id", "currency")
    expected = {
        tuple(row[name] for name in names): row["credit_micros"]
        for row in credit_orders(orders, touches)["campaigns"]
        if row["credit_micros"]
    }
    columns = ", ".join(f"{model}_micros" for model in MODELS)
    rows = reader.dicts("attributed_orders", f"order_id, revision, campaign_id, currency, window_days, {columns}")
    newest: dict[str, int] = {}
    for row in rows:
        newest[row["order_id"]] = max(row["revision"], newest.get(row["order_id"], row["revision"]))
    got: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        if row["revision"] != newest[row["order_id"]] or row["campaign_id"] is None:
            continue
        for model in MODELS:
            for window, micros in zip(row["window_days"], row[f"{model}_micros"], strict=True):
                if micros and window in WINDOWS:
                    got[model, window, row["campaign_id"], row["currency"]] += micros
    _agree("credits", dict(got), expected)


def daily_spend(books: Books) -> dict[tuple[str, str, str, str], int]:
    """Return the spend of each day, campaign, store and currency in micros, rounded once, half away from zero."""
    nanos: Counter[tuple[str, str, str, str]] = Counter()
    for event in books.events.values():
        day = event["event_time"].date().isoformat()
        nanos[day, event["campaign_id"], event["store_id"], event["currency"]] += event["spend_nanos"]
    return {key: (amount + 500) // 1000 for key, amount in nanos.items()}


def check_bills(reader: Reader, books: Books, closed_through: datetime) -> None:
    """Compare the sums of the billing lines of closed days with the rounded spend."""
    got: Counter[tuple[str, str, str, str]] = Counter()
    for row in reader.dicts("billing_lines", "event_date, campaign_id, store_id, currency, amount_micros"):
        got[row["event_date"].isoformat(), row["campaign_id"], row["store_id"], row["currency"]] += row["amount_micros"]
    last = closed_through.date().isoformat()
    expected = {key: amount for key, amount in daily_spend(books).items() if amount and key[0] < last}
    _agree("bills", {key: amount for key, amount in got.items() if amount}, expected)


def check_marts(path: Path, books: Books, *, offered: bool = True) -> None:
    """Compare the published marts with the books: the accounting of each hour and the measures of each campaign and day."""
    counts = (*(_COUNTS if offered else ("accepted", "late", "unpriced")), "invalid_traffic")
    with duckdb.connect(str(path), read_only=True) as marts:
        marts.execute("set timezone = 'UTC'")
        listed = ", ".join(f"sum({name})::bigint" for name in counts)
        rows = marts.execute(f"select region, epoch_us(event_hour), {listed} from fct_event_accounting group by all").fetchall()
        names = "event_date, campaign_id, store_id, currency"
        measures = "sum(impressions)::bigint, sum(clicks)::bigint, sum(spend_nanos)"
        days = marts.execute(f"select {names}, {measures} from fct_campaign_day group by all").fetchall()
    expected: dict[Any, list[int]] = {
        (region, _us(hour)): [cell[name] for name in counts]
        for (stream, region, hour), cell in books.ledger.items()
        if stream == "events"
    }
    got: dict[Any, list[int]] = {(region, hour): list(cell) for region, hour, *cell in rows}
    _agree("mart fct_event_accounting", {k: v for k, v in got.items() if any(v)}, {k: v for k, v in expected.items() if any(v)})
    of_days: dict[Any, list[int]] = {}
    for event in books.events.values():
        key = (event["event_time"].date(), event["campaign_id"], event["store_id"], event["currency"])
        cell = of_days.setdefault(key, [0, 0, 0])
        if event["invalid_traffic_rule"] is None:
            cell[event["event_type"] == "click"] += 1
            cell[2] += event["spend_nanos"]
    found = {tuple(row[:4]): [int(value) for value in row[4:]] for row in days}
    _agree("mart fct_campaign_day", {k: v for k, v in found.items() if any(v)}, {k: v for k, v in of_days.items() if any(v)})
