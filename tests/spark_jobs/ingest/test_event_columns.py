"""Columns and increments of events against plain Python: to the microsecond, the row and the nano."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any

import parsed
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spark_jobs.ingest.contract.spec import CONTRACTS, EVENT_CONTRACT, LATEST_US
from spark_jobs.ingest.event_columns import (
    CAMPAIGN_SCHEMA,
    INCREMENT_SCHEMA,
    METRIC_KEYS,
    METRIC_MEASURES,
    enrich,
    event_columns,
    increment_columns,
    increments,
    price,
    sum_increments,
)
from spark_jobs.lake.tables import EVENTS, MINUTE_METRICS
from spark_jobs.traffic.rules import Rule, no_rules
from spark_jobs.units import HOUR_US
from tests.spark_jobs.ingest.contract.cases import LIMITS

PROPERTY = settings(max_examples=150, deadline=None)
WITH_DATABASE = settings(max_examples=25, deadline=None)  # each example asks DuckDB a few times
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TEN = 1_748_858_400_000_000  # 2025-06-02T10:00:00Z
NO_CAMPAIGNS = CAMPAIGN_SCHEMA.empty_table()

Range = tuple[str, str, int, int | None]  # campaign, billing model, from, to


def campaigns_of(ranges: list[Range]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(CAMPAIGN_SCHEMA.names, row, strict=True)) for row in ranges], CAMPAIGN_SCHEMA)


def priced(rows: list[dict[str, Any]], ranges: list[Range]) -> list[tuple[str | None, int]]:
    model, spend = price(parsed.parsed("events", rows), campaigns_of(ranges))
    assert (model.type, spend.type) == (pa.string(), pa.int64())
    return list(zip(model.to_pylist(), spend.to_pylist(), strict=True))


def price_one_by_one(row: dict[str, Any], ranges: list[Range]) -> tuple[str | None, int]:
    """The oracle."""
    for campaign, model, start, end in ranges:
        if campaign == row["campaign_id"] and start <= row["event_time"] and (end is None or row["event_time"] < end):
            if model == "cpc" and row["event_type"] == "click":
                return model, row["price_micros"] * 1000
            if model == "cpm" and row["event_type"] == "impression":
                return model, row["price_micros"]
            return model, 0
    return None, 0


@st.composite
def price_lists(draw: st.DrawFn) -> list[Range]:
    """Ranges of a few campaigns, none of one campaign overlapping, in any order, with gaps or without, the last perhaps open."""
    ranges: list[Range] = []
    for campaign in draw(st.lists(st.sampled_from(["a", "b", "c", "", "ab"]), unique=True, max_size=4)):
        edges = sorted(draw(st.lists(st.integers(0, 12), unique=True, min_size=1, max_size=9)))
        spans: list[tuple[int, int | None]] = list(zip(edges[::2], edges[1::2], strict=False))
        if draw(st.booleans()):
            spans = list(pairwise(edges))
        if draw(st.booleans()):
            spans.append((edges[-1], None))
        ranges += [(campaign, draw(st.sampled_from(["cpc", "cpm"])), start, end) for start, end in spans]
    return draw(st.permutations(ranges))


PRICED_EVENT = st.fixed_dictionaries(
    {
        "campaign_id": st.sampled_from(["a", "b", "c", "ab", "unknown"]),
        "event_type": st.sampled_from(["impression", "click"]),
        "event_time": st.integers(0, 13),
        "price_micros": st.sampled_from([0, 1, 1500, 10**12]),
    }
)


@PROPERTY
@given(rows=st.lists(PRICED_EVENT, max_size=12), ranges=price_lists())
@example(rows=[], ranges=[("a", "cpc", 0, None)])
@example(rows=[], ranges=[])
def test_prices_are_those_of_the_price_list(rows: list[dict[str, Any]], ranges: list[Range]) -> None:
    assert priced(rows, ranges) == [price_one_by_one(row, ranges) for row in rows]


@pytest.mark.parametrize(
    ("model", "event_type", "price_micros", "nanos"),
    [
        ("cpc", "click", 250_000, 250_000_000),
        ("cpc", "click", 1, 1000),
        ("cpc", "click", 10**12, 10**15),
        ("cpc", "impression", 250_000, 0),
        ("cpm", "impression", 1, 1),
        ("cpm", "impression", 10**12, 10**12),
        ("cpm", "click", 1, 0),
        ("cpc", "click", 0, 0),
    ],
)
def test_what_an_event_costs(model: str, event_type: str, price_micros: int, nanos: int) -> None:
    row = {"event_type": event_type, "price_micros": price_micros}
    assert priced([row], [("c", model, 0, None)]) == [(model, nanos)]
    assert priced([row], [("other", model, 0, None)]) == [(None, 0)]


@pytest.mark.parametrize(
    ("event_time", "model"),
    [(TEN - 1, None), (TEN, "cpm"), (TEN + 4, "cpm"), (TEN + 5, "cpc"), (TEN + 9, "cpc"), (TEN + 10, None), (TEN + 20, "cpm")],
)
def test_a_range_holds_its_beginning_and_not_its_end(event_time: int, model: str | None) -> None:
    ranges: list[Range] = [("c", "cpc", TEN + 5, TEN + 10), ("c", "cpm", TEN + 20, None), ("c", "cpm", TEN, TEN + 5)]
    assert priced([{"event_time": event_time}], ranges)[0][0] == model


def enriched(stream: str, rows: list[dict[str, Any]], grace_us: int = LIMITS.hour_grace_us) -> pa.Table:
    return enrich(parsed.parsed(stream, rows), CONTRACTS[stream], replace(LIMITS, hour_grace_us=grace_us), NO_CAMPAIGNS, no_rules())


@pytest.mark.parametrize("stream", sorted(CONTRACTS))
@pytest.mark.parametrize("grace_us", [0, 1, 900_000_000, 7 * HOUR_US])
@pytest.mark.parametrize("within_us", [0, 1, HOUR_US // 2, HOUR_US - 1])
def test_late_begins_at_the_microsecond(stream: str, grace_us: int, within_us: int) -> None:
    """Late: received the grace after the end of the event's hour, or later."""
    edge = TEN + HOUR_US + grace_us
    received = [edge - HOUR_US, edge - 1, edge, edge + 1, edge + 1000 * HOUR_US]
    time = {CONTRACTS[stream].time_field: TEN + within_us}
    made = enriched(stream, [{**time, "received_at": at} for at in received], grace_us)
    assert made["is_late"].to_pylist() == [False, False, True, True, True]
    assert made["hour_us"].to_pylist() == [TEN] * 5
    assert made["received_at"].to_pylist() == received


@pytest.mark.parametrize("stream", sorted(CONTRACTS))
def test_what_was_received_at_no_known_time_was_received_when_it_was_ingested(stream: str) -> None:
    hour = LIMITS.ingested_us - LIMITS.ingested_us % HOUR_US
    time_field = CONTRACTS[stream].time_field
    made = enriched(stream, [{time_field: at, "received_at": None} for at in (hour, hour - HOUR_US, hour - 2 * HOUR_US)])
    assert made["received_at"].to_pylist() == [LIMITS.ingested_us] * 3
    assert LIMITS.ingested_us == hour, "the hour before has just ended"
    assert made["is_late"].to_pylist() == [False, False, True]


@WITH_DATABASE
@given(
    rows=st.lists(st.tuples(st.integers(0, LATEST_US), st.none() | st.integers(0, LATEST_US)), max_size=10),
    grace=st.integers(0, 3 * HOUR_US),
)
def test_hours_and_late_against_plain_python(rows: list[tuple[int, int | None]], grace: int) -> None:
    made = enriched("events", [{"event_time": time, "received_at": received} for time, received in rows], grace)
    for (time, received), hour, late in zip(rows, made["hour_us"].to_pylist(), made["is_late"].to_pylist(), strict=True):
        assert hour % HOUR_US == 0 and hour <= time < hour + HOUR_US
        closed = hour + HOUR_US + grace
        assert late == ((LIMITS.ingested_us if received is None else received) >= closed)


def test_enriched_rows_keep_their_order_and_their_fields() -> None:
    rows: list[dict[str, Any]] = [{"event_id": "b", "placement": "top"}, {"event_id": "a"}, {"event_id": "b"}]
    before = parsed.parsed("events", rows)
    made = enriched("events", rows)
    assert made.select(before.column_names).to_pylist() == before.to_pylist()
    orders = enriched("orders", [{}, {"order_id": "p"}])
    assert orders["order_id"].to_pylist() == ["o", "p"]
    assert not {"billing_model", "spend_nanos"} & set(orders.column_names)


METRIC_EVENT = st.fixed_dictionaries(
    {
        "event_type": st.sampled_from(["impression", "click"]),
        "event_time": st.sampled_from([0, 59_999_999, 60_000_000, TEN - 1, TEN, TEN + 1, TEN + 60_000_000]),
        "region": st.sampled_from(["eu", "us"]),
        "campaign_id": st.sampled_from(["c", "d"]),
        "ad_id": st.sampled_from(["a", "a", "b"]),
        "store_id": st.sampled_from(["s", "s", "t"]),
        "placement": st.sampled_from([None, "", "top"]),
        "currency": st.sampled_from(["EUR", "USD"]),
        "price_micros": st.sampled_from([0, 1, 1500, 10**12]),
        "user_id": st.sampled_from(["u", "u", "bot"]),
    }
)
PRICES: list[Range] = [("c", "cpm", 0, None), ("d", "cpc", 0, None)]
RULES = no_rules().model_copy(update={"listed_user": Rule(), "users": ("bot",)})


def staged(rows: list[dict[str, Any]]) -> pa.Table:
    return enrich(parsed.parsed("events", rows), EVENT_CONTRACT, LIMITS, campaigns_of(PRICES), RULES)


def sums_of(table: pa.Table) -> dict[tuple[Any, ...], dict[str, int]]:
    rows = table.to_pylist()
    made = {tuple(row[name] for name in METRIC_KEYS): {name: row[name] for name in METRIC_MEASURES} for row in rows}
    assert len(made) == len(rows), "one row a key"
    return made


def count(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, int]]:
    """The oracle."""
    total: Counter[tuple[Any, ...]] = Counter()
    for row in (parsed.BASE["events"] | row for row in rows):
        minute = row["event_time"] // 60_000_000 * 60_000_000
        key = (minute, *(row[name] for name in METRIC_KEYS[1:]))
        invalid = "invalid_" if row["user_id"] == "bot" else ""
        total[key, f"{invalid}{row['event_type']}s"] += 1
        total[key, f"{invalid}spend_nanos"] += price_one_by_one(row, PRICES)[1]
    return {key: {name: total[key, name] for name in METRIC_MEASURES} for key, _ in total}


@WITH_DATABASE
@given(st.lists(METRIC_EVENT, max_size=25))
def test_increments_are_the_sums_of_the_events(rows: list[dict[str, Any]]) -> None:
    made = increments(staged(rows))
    assert set(made.column_names) == set(INCREMENT_SCHEMA.names)
    assert sums_of(made) == count(rows)


@WITH_DATABASE
@given(st.lists(st.lists(METRIC_EVENT, max_size=8), max_size=4))
def test_increments_of_parts_add_up_to_those_of_the_whole(parts: list[list[dict[str, Any]]]) -> None:
    whole = staged([row for rows in parts for row in rows])
    starts = [sum(map(len, parts[:at])) for at in range(len(parts))]
    made = sum_increments([increments(whole.slice(start, len(rows))) for start, rows in zip(starts, parts, strict=True)])
    assert made.schema == INCREMENT_SCHEMA
    assert sums_of(made) == count([row for rows in parts for row in rows])
    assert sums_of(sum_increments([made])) == sums_of(made)


def test_a_minute_of_the_dearest_clicks_fits() -> None:
    rows = [{"event_type": "click", "campaign_id": "d", "price_micros": 10**12}] * 9
    ((key, measures),) = sums_of(increments(staged(rows))).items()
    assert (key[0], measures["clicks"], measures["spend_nanos"]) == (TEN, 9, 9 * 10**15)


def record_uuid(row: dict[str, Any], query_id: str, batch_id: int) -> str:
    """The record_uuid as the table's users may compute it."""
    texts = ["-" if row[name] is None else f"{len(row[name])}:{row[name]}" for name in METRIC_KEYS[1:]]
    digest = hashlib.md5("\x1f".join([query_id, str(batch_id), str(row["event_minute_us"]), *texts]).encode()).hexdigest()
    return "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:]))


def test_columns_of_increments() -> None:
    rows: list[dict[str, Any]] = [
        {"placement": None},
        {"placement": ""},
        {"placement": "-"},
        {"placement": "1:a\x1f1:b"},
        {"ad_id": "a\x1f1:s"},
        {"placement": "e\u0301", "event_time": TEN + 61_000_000},
        {"event_time": TEN - TEN % (24 * HOUR_US)},
        {"event_time": TEN - TEN % (24 * HOUR_US) - 1},
    ]
    sums = increments(staged(rows))
    made = increment_columns(sums, "query", 7)
    own = {"_query_id", "_batch_id", "_run_id"}
    assert set(MINUTE_METRICS.schema.names) - own <= set(made.column_names)
    assert sums_of(made) == sums_of(sums) == count(rows)
    assert len(set(made["record_uuid"].to_pylist())) == len(rows)
    for row in made.to_pylist():
        assert row["record_uuid"] == record_uuid(row, "query", 7)
        assert row["event_minute"] == EPOCH + timedelta(microseconds=row["event_minute_us"])
        assert row["event_date"] == row["event_minute"].date()
    others = [increment_columns(sums, *batch)["record_uuid"].to_pylist() for batch in (("query", 7), ("query", 8), ("other", 7))]
    uuids = set(made["record_uuid"].to_pylist())
    assert [len(uuids & set(other)) for other in others] == [len(rows), 0, 0]


def of_file(rows: int, first_line: int) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """The file and the first line of so many rows of one file."""
    return pa.chunked_array([pa.array(["events/eu/1.jsonl"] * rows, pa.string())]), pa.chunked_array(
        [pa.array([first_line] * rows, pa.int64())]
    )


@pytest.mark.parametrize(
    ("event_time", "day", "hour"),
    [
        (0, date(1970, 1, 1), 0),
        (TEN, date(2025, 6, 2), 10),
        (TEN - 1, date(2025, 6, 2), 9),
        (TEN + 14 * HOUR_US - 1, date(2025, 6, 2), 23),
        (TEN + 14 * HOUR_US, date(2025, 6, 3), 0),
        (951_782_400_000_000 + 24 * HOUR_US - 1, date(2000, 2, 29), 23),
        (LATEST_US, date(9999, 12, 31), 23),
    ],
)
def test_partition_of_an_event(event_time: int, day: date, hour: int) -> None:
    made = event_columns(staged([{"event_time": event_time}]), *of_file(1, 1), None)
    assert (made["event_date"].to_pylist(), made["event_hour"].to_pylist()) == ([day], [hour])


@WITH_DATABASE
@given(times=st.lists(st.integers(0, LATEST_US), max_size=8), first_line=st.integers(1, 10**9))
def test_columns_of_events(times: list[int], first_line: int) -> None:
    users = ("u", "bot")
    rows: list[dict[str, Any]] = [
        {"event_id": str(at), "event_time": time, "user_id": users[at % 2]} for at, time in enumerate(times)
    ]
    before = staged(rows).to_pylist()
    made = event_columns(staged(rows), *of_file(len(rows), first_line), "set")
    own = {"ingested_at", "_query_id", "_batch_id", "_run_id"}
    assert set(made.column_names) == set(EVENTS.schema.names) - own
    assert made["rule_set"].to_pylist() == ["set"] * len(times)
    hits = [None if row["user_id"] == "u" else "listed_user" for row in rows]
    assert made["invalid_traffic_rule"].to_pylist() == hits
    assert made["invalid_traffic_rules"].to_pylist() == [None if hit is None else [hit] for hit in hits]
    for name in made.column_names:
        assert made.schema.field(name).type == EVENTS.schema.field(name).type, name
    for row, source in zip(made.to_pylist(), before, strict=True):
        moment = EPOCH + timedelta(microseconds=source["event_time"])
        assert row["event_time"] == moment
        assert (row["event_date"], row["event_hour"]) == (moment.date(), moment.hour)
        assert row["received_at"] == EPOCH + timedelta(microseconds=source["received_at"])
        assert row["source_line"] == source["n"] + first_line
        assert row["source_file"] == "events/eu/1.jsonl"
        assert row["fingerprint"] % 2**64 == source["fingerprint"]
        same = {name for name in source if name in row} - {"event_time", "received_at", "fingerprint"}
        assert same >= {
            "event_id",
            "price_micros",
            "placement",
            "region",
            "billing_model",
            "spend_nanos",
            "invalid_spend_nanos",
            "is_late",
        }
        assert {name: row[name] for name in same} == {name: source[name] for name in same}
