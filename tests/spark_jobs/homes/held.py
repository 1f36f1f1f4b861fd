"""What a lakehouse holds, read without Spark, against what the oracle says."""

from __future__ import annotations

import base64
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

from spark_jobs.config import Settings
from spark_jobs.lake.duck import connect_delta
from tests.spark_jobs.homes import oracle
from tests.spark_jobs.homes.oracle import Books

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_TIMES = {"event_time", "received_at", "ingested_at", "order_time", "cancelled_at", "event_hour", "event_minute", "max_received_at"}
_BATCH = ("_query_id", "_batch_id")
_MINUTE = ("event_minute", *oracle.MINUTE_KEYS)
_MEASURES = oracle.MINUTE_MEASURES


_MARKS = ("spend_nanos", "invalid_spend_nanos", "invalid_traffic_rule")


def _us(moment: datetime | str | None) -> int | str | None:
    return (moment - _EPOCH) // _MICROSECOND if isinstance(moment, datetime) else moment


class Held:
    """Reader of the tables of a home, without Spark."""

    def __init__(self, home: Settings) -> None:
        self._home = home
        self._database = connect_delta(lakehouse=home.lakehouse_uri)
        self._database.execute("set timezone = 'UTC'")

    def rows(self, table: str, columns: str) -> list[tuple[Any, ...]]:
        return self._database.execute(f"select {columns} from delta_scan('{self._home.table_uri(table)}')").fetchall()

    def dicts(self, table: str, columns: str) -> list[dict[str, Any]]:
        """Rows as dicts; the times among ``columns`` as microseconds."""
        names = columns.replace(",", " ").split()
        listed = ", ".join(f"epoch_us({name})" if name in _TIMES else name for name in names)
        return [dict(zip(names, row, strict=True)) for row in self.rows(table, listed)]

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table as the oracle tells it."""
    told = {**row, "source": (row["source_file"], row["source_line"])}
    for name in ("received_at", "cancelled_at"):
        if row["ingested_at"] is not None and told.get(name) == row["ingested_at"]:
            told[name] = oracle.INGESTED
    return {name: value for name, value in told.items() if name not in ("source_file", "source_line", "ingested_at")}


def _expected(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _us(value) if isinstance(value, datetime) else value for name, value in row.items()}


def _agree(what: str, got: dict[Any, Any], expected: dict[Any, Any]) -> None:
    """The two dicts are equal; else the first few entries that differ, as got and as expected."""
    wrong = [(key, got.get(key), expected.get(key)) for key in {**expected, **got} if got.get(key) != expected.get(key)]
    assert not wrong, "\n".join(
        [f"{what}: {len(wrong)} differ", *(f"{k}:\n  got      {g}\n  expected {e}" for k, g, e in wrong[:4])]
    )


def _by(rows: list[dict[str, Any]], *key: str) -> dict[Any, dict[str, Any]]:
    """Rows by their key, which must be one."""
    made = {tuple(row[name] for name in key) if len(key) > 1 else row[key[0]]: row for row in rows}
    assert len(made) == len(rows), f"{key} is no key"
    return made


def check_accepted(held: Held, books: Books) -> None:
    """Events and orders, column by column."""
    payload = ", ".join((*oracle.EVENT_IDS, *oracle.EVENT_TEXTS))
    columns = f"{payload}, event_type, event_time, received_at, region, price_micros, currency, billing_model, is_late"
    marks = "spend_nanos, invalid_spend_nanos, invalid_traffic_rule, invalid_traffic_rules"
    events = held.dicts("events", f"{columns}, {marks}, source_file, source_line, ingested_at")
    told = _by([_told(row) for row in events], "event_id")
    _agree("events", told, {name: _expected(row) for name, row in books.events.items()})
    columns = (
        "order_id, order_time, received_at, region, user_id, store_id, total_micros, currency, status, cancelled_at, has_placed"
    )
    orders = held.dicts("orders", f"{columns}, is_late, source_file, source_line, ingested_at")
    for row in orders:
        # a row keeps the time of the batch that changed it last, so this is all that a time of ingestion can be held to
        expected = books.orders.get(row["order_id"], {})
        row["ingested_at"] = None
        for name in ("received_at", "cancelled_at"):
            if expected.get(name) == oracle.INGESTED and row[name] is not None:
                assert abs(time.time() - row[name] / 1e6) < 900
                row[name] = oracle.INGESTED
    told = _by([_told(row) for row in orders], "order_id")
    _agree("orders", told, {name: _expected(row) for name, row in books.orders.items()})


def check_refused(held: Held, books: Books) -> None:
    """Rejected and conflicting records by file and line, their bytes, and whom a conflict lost to."""
    columns = "source_file, source_line, outcome, raw, raw_encoding, reason_codes, record_id, fingerprint, accepted_fingerprint"
    tables = {table: held.dicts(table, columns) for table in ("rejected_events", "rejected_orders")}
    rows = _by([row for found in tables.values() for row in found], "source_file", "source_line")
    got = {
        place: (row["outcome"], base64.b64decode(row["raw"]) if row["raw_encoding"] == "base64" else row["raw"].encode())
        for place, row in rows.items()
    }
    _agree("refused", got, dict(books.refused))
    assert all(row["reason_codes"] for row in rows.values())
    holders = dict(held.rows("events", "event_id, printf('%016x', fingerprint)"))
    for row in tables["rejected_events"]:
        if row["outcome"] == "conflict":
            assert row["accepted_fingerprint"] == holders[row["record_id"]] != row["fingerprint"]


def check_ledger(held: Held, books: Books) -> None:
    """Conservation in each row, and the sums per stream, region and event hour."""
    measures = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "unpriced", "invalid_traffic", "spend_nanos")
    key = "_query_id, _batch_id, _run_id, stream, source, region, event_hour"
    sums: dict[tuple[str, str, int | None], Counter[str]] = {}
    received: dict[tuple[str, str, int | None], int] = {}
    for row in _by(held.dicts("batch_ledger", f"{key}, {', '.join(measures)}, max_received_at"), *key.split(", ")).values():
        assert row["offered"] == row["accepted"] + row["duplicate"] + row["conflict"] + row["rejected"], row
        assert max(row["late"], row["unpriced"]) <= row["accepted"], row
        cell = (row["stream"], row["region"], row["event_hour"])
        if row["offered"] or row["invalid_traffic"] or row["spend_nanos"]:
            sums.setdefault(cell, Counter()).update({name: row[name] for name in measures})
        if row["max_received_at"] is not None:
            received[cell] = max(received.get(cell, row["max_received_at"]), row["max_received_at"])
    expected = {(stream, region, _us(hour)): counts for (stream, region, hour), counts in books.ledger.items()}
    _agree("ledger", {cell: +counts for cell, counts in sums.items()}, {cell: +counts for cell, counts in expected.items()})
    latest: dict[tuple[str, str, Any], list[Any]] = {}
    for event in books.events.values():
        latest.setdefault(("events", event["region"], _us(oracle.hour_of(event["event_time"]))), []).append(event["received_at"])
    for cell, moments in latest.items():
        if oracle.INGESTED not in moments:
            assert received[cell] == _us(max(moments))


def check_minutes(held: Held, books: Books) -> None:
    """The increments' sums per minute and key."""
    totals: dict[Any, list[int]] = {}
    for row in held.dicts("minute_metrics", ", ".join((*_MINUTE, *_MEASURES))):
        cell = totals.setdefault(tuple(row[name] for name in _MINUTE), [0] * len(_MEASURES))
        cell[:] = [before + row[name] for before, name in zip(cell, _MEASURES, strict=True)]
    _agree("minutes", totals, {(_us(minute), *key): measures for (minute, *key), measures in books.minutes.items()})


def check_increments(held: Held) -> None:
    """One increment a batch and key, of the events of that batch, under the name that just this batch and key give it."""
    rows = held.dicts("minute_metrics", ", ".join(("record_uuid", *_BATCH, *_MINUTE, *_MEASURES)))
    for row in rows:
        minute = _EPOCH + timedelta(microseconds=row["event_minute"])
        named = oracle.record_uuid(row["_query_id"], row["_batch_id"], minute, [row[name] for name in oracle.MINUTE_KEYS])
        assert row["record_uuid"] == named, row
    _by(rows, "record_uuid")
    increments = {key: [row[name] for name in _MEASURES] for key, row in _by(rows, *_BATCH, *_MINUTE).items()}
    of_events: dict[Any, list[int]] = {}
    for event in held.dicts("events", ", ".join((*_BATCH, "event_time", *oracle.MINUTE_KEYS, "event_type", *_MARKS))):
        minute_us = event["event_time"] // 60_000_000 * 60_000_000
        key = (*(event[name] for name in _BATCH), minute_us, *(event[name] for name in oracle.MINUTE_KEYS))
        cell = of_events.setdefault(key, [0] * len(_MEASURES))
        cell[2 * (event["invalid_traffic_rule"] is not None) + (event["event_type"] == "click")] += 1
        cell[4] += event["spend_nanos"]
        cell[5] += event["invalid_spend_nanos"]
    _agree("increments", increments, of_events)
