"""Keys of records: what makes two ids one, and what makes two payloads differ."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import parsed
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spark_jobs.ingest.contract.spec import CONTRACTS, Contract, Field, FieldKind
from spark_jobs.ingest.dedupe.keys import Keys, hex_fingerprint, keys_of_ids
from spark_jobs.ingest.event_columns import CAMPAIGN_SCHEMA, enrich
from spark_jobs.traffic.rules import no_rules
from tests.spark_jobs.ingest.contract.cases import LIMITS

ROOT = Path(__file__).resolve().parents[4]
PROPERTY = settings(max_examples=150, deadline=None)
WITH_DATABASE = settings(max_examples=40, deadline=None)  # each example asks DuckDB a few times
STREAMS = sorted(CONTRACTS)
NOT_IN_THE_PAYLOAD = {"events": {"event_id", "received_at", "region"}, "orders": {"order_id", "received_at", "region"}}
# (stream, field) for every field of the contracts: a new one must be judged here too
FIELDS = [(stream, field.name) for stream in STREAMS for field in CONTRACTS[stream].fields]

# texts that would run into one another without escapes, separators and a sign for null
NASTY = st.sampled_from([None, "", "\x01", "\x1f", "\0", "\0a", "a", "b", "ab", "\x01e", "\x01s", "a\x1fb", "s", "é"])


def keys_of(stream: str, rows: list[dict[str, Any]]) -> Keys:
    """Keys of parsed rows, as the tasks of a batch make them."""
    made = enrich(parsed.parsed(stream, rows), CONTRACTS[stream], LIMITS, CAMPAIGN_SCHEMA.empty_table(), no_rules())
    return Keys(*(made[name].to_numpy() for name in ("key_low", "key_high", "fingerprint")))


def ids_of(keys: Keys) -> list[tuple[int, int]]:
    return list(zip(keys.low.tolist(), keys.high.tolist(), strict=True))


def another(field: Field, value: Any) -> Any:
    """A valid value that differs from ``value``."""
    match field.kind:
        case FieldKind.INTEGER | FieldKind.TIME:
            return value + 1
        case FieldKind.ENUM:
            return next(other for other in field.values if other != value)
        case FieldKind.CURRENCY:
            return "USD"
        case FieldKind.REGION:
            return "us"
        case _:
            return f"{value or ''}x"


@pytest.mark.parametrize(("stream", "name"), FIELDS)
def test_which_fields_the_fingerprint_covers(stream: str, name: str) -> None:
    contract = CONTRACTS[stream]
    field = next(field for field in contract.fields if field.name == name)
    keys = keys_of(stream, [{}, {name: another(field, parsed.BASE[stream][name])}])
    before, after = keys.fingerprint.tolist()
    assert (before == after) == (name in NOT_IN_THE_PAYLOAD[stream])
    assert (ids_of(keys)[0] == ids_of(keys)[1]) == (name != contract.id_field)


def test_an_absent_received_at_is_no_other_payload() -> None:
    keys = keys_of("events", [{}, {"received_at": None}])
    assert keys.fingerprint[0] == keys.fingerprint[1]


@pytest.mark.parametrize("name", [f.name for f in CONTRACTS["events"].fields if not f.required and f.kind is FieldKind.TEXT])
def test_null_and_texts_near_it_differ(name: str) -> None:
    values = [None, "", "\x01", "\x1f", "\x01e", "\x01s", "e", " "]
    assert len(set(keys_of("events", [{name: value} for value in values]).fingerprint.tolist())) == len(values)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"campaign_id": "a", "ad_id": "bc"}, {"campaign_id": "ab", "ad_id": "c"}),
        ({"campaign_id": "a", "ad_id": "b"}, {"campaign_id": "b", "ad_id": "a"}),
        ({"campaign_id": "a\x1fb", "ad_id": "c"}, {"campaign_id": "a", "ad_id": "b\x1fc"}),
        ({"impression_id": "x", "placement": None}, {"impression_id": None, "placement": "x"}),
        ({"impression_id": "", "placement": None}, {"impression_id": None, "placement": ""}),
        ({"price_micros": 1, "user_agent": "2"}, {"price_micros": 12, "user_agent": ""}),
        ({"event_time": 1_748_858_400_000_001}, {"event_time": 1_748_858_400_000_000}),
        ({"user_agent": "é"}, {"user_agent": "e\u0301"}),
    ],
)
def test_texts_that_join_to_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    fingerprints = keys_of("events", [one, other]).fingerprint
    assert fingerprints[0] != fingerprints[1]


@WITH_DATABASE
@given(rows=st.lists(st.tuples(NASTY, NASTY, NASTY, NASTY, st.sampled_from([0, 1, 11])), min_size=2, max_size=30))
@example(rows=[("a", None, "b", "c", 1), ("a", None, "b", "c", 1)])
def test_payloads_and_fingerprints_differ_together(rows: list[tuple[Any, ...]]) -> None:
    records = [
        {"campaign_id": a or "-", "impression_id": b, "placement": c, "user_agent": d, "price_micros": price}
        for a, b, c, d, price in rows
    ]
    payloads = {tuple(record.values()) for record in records}
    assert len(set(keys_of("events", records).fingerprint.tolist())) == len(payloads)


@WITH_DATABASE
@given(st.lists(st.text(min_size=1, max_size=128), min_size=1, max_size=10))
def test_the_index_is_rebuilt_with_the_keys_that_the_tasks_made(ids: list[str]) -> None:
    """keys_of_ids reads what the table holds: the id, and the fingerprint as a signed number."""
    keys = keys_of("events", [{"event_id": text, "price_micros": at} for at, text in enumerate(ids)])
    stored = pa.table({"event_id": ids, "other": ids, "fingerprint": pa.array(keys.fingerprint.view(np.int64))})
    halves = pa.concat_tables([stored.slice(0, 1), stored.slice(1)])
    for table in (stored, halves):
        rebuilt = keys_of_ids(table, "event_id", "fingerprint")
        assert as_rows(rebuilt) == as_rows(keys)
    assert len(set(ids_of(keys))) == len(set(ids))


def test_keys_of_no_ids() -> None:
    empty = pa.schema([("event_id", pa.string()), ("fingerprint", pa.int64())]).empty_table()
    rebuilt = keys_of_ids(empty, "event_id", "fingerprint")
    assert len(rebuilt) == 0
    assert rebuilt.low.dtype == rebuilt.high.dtype == rebuilt.fingerprint.dtype == np.uint64


def canonical(contract: Contract, row: dict[str, Any]) -> str:
    """The payload as it is hashed: every field in the contract's order, 0x01 and 0x1F in texts escaped, null as 0x01."""
    parts = []
    for field in contract.payload:
        value = row[field.name]
        if value is None:
            parts.append("\x01")
        elif field.kind in (FieldKind.ID, FieldKind.TEXT):
            parts.append(value.replace("\x01", "\x01e").replace("\x1f", "\x01s"))
        else:
            parts.append(str(value))
    return "\x1f".join(parts)


@pytest.mark.parametrize("stream", STREAMS)
def test_fingerprints_stay_what_they_are(stream: str) -> None:
    """They are stored in the tables: computed in another way, every resent record would be in conflict with itself."""
    changes: list[dict[str, Any]] = [{}, {"user_id": "ü"}, {"store_id": "\x1f"}]
    if stream == "events":
        changes += [{"placement": "", "impression_id": "i"}, {"price_micros": 0, "user_agent": "agent"}]
    contract = CONTRACTS[stream]
    keys = keys_of(stream, changes)
    for at, change in enumerate(changes):
        row = {**parsed.BASE[stream], **change}
        digest = hashlib.md5(canonical(contract, row).encode()).digest()
        assert int(keys.fingerprint[at]) == int.from_bytes(digest[8:], sys.byteorder)
        digest = hashlib.md5(row[contract.id_field].encode()).digest()
        assert ids_of(keys)[at] == (int.from_bytes(digest[:8], sys.byteorder), int.from_bytes(digest[8:], sys.byteorder))


WORDS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63, 2**64 - 1])
ROWS = st.lists(st.tuples(st.sampled_from([0, 1, 2**64 - 1]) | WORDS, st.sampled_from([0, 1, 2**63]) | WORDS, WORDS), max_size=20)


def from_rows(rows: list[tuple[int, int, int]]) -> Keys:
    return Keys(*(np.array([row[at] for row in rows], dtype=np.uint64) for at in range(3)))


def as_rows(keys: Keys) -> list[tuple[int, ...]]:
    return list(zip(keys.low.tolist(), keys.high.tolist(), keys.fingerprint.tolist(), strict=True))


@PROPERTY
@given(rows=ROWS, cut=st.integers(0, 20))
def test_keys_of_splits_are_joined_and_selected(rows: list[tuple[int, int, int]], cut: int) -> None:
    keys = from_rows(rows)
    assert len(keys) == len(rows)
    assert as_rows(keys) == rows
    parts = [pickle.loads(pickle.dumps(from_rows(part))) for part in (rows[:cut], [], rows[cut:])]  # as on the way to the driver
    assert as_rows(Keys.concatenate(parts)) == rows
    mask = np.array([row[0] % 2 == 0 for row in rows], dtype=bool)
    assert as_rows(keys.take(mask)) == [row for row in rows if row[0] % 2 == 0]
    assert as_rows(keys.take(np.flatnonzero(~mask))) == [row for row in rows if row[0] % 2]


def test_no_keys() -> None:
    empty = Keys.concatenate([])
    assert (len(empty), as_rows(empty)) == (0, [])
    assert empty.low.dtype == np.uint64
    assert empty.order.tolist() == []


@PROPERTY
@given(ROWS)
@example([(1, 2, 0), (1, 1, 1), (1, 2, 2)])
@example([(1, 1, 0), (0, 5, 1), (1, 1, 2), (0, 5, 3)])
def test_order_is_that_of_the_ids_then_of_the_records(rows: list[tuple[int, int, int]]) -> None:
    assert from_rows(rows).order.tolist() == sorted(range(len(rows)), key=lambda at: (*rows[at][:2], at))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0" * 16), (255, "00000000000000ff"), (2**64 - 1, "f" * 16), (-1, "f" * 16), (-(2**63), "8" + "0" * 15)],
)
def test_a_fingerprint_as_people_see_it(value: int, text: str) -> None:
    assert hex_fingerprint(value) == text


TWO_STREAMS = """
import faulthandler, sys, threading
faulthandler.dump_traceback_later(25, exit=True)  # works while a thread holds the interpreter
sys.setswitchinterval(1e-5)
import parsed
import pyarrow as pa
from spark_jobs.ingest.contract.spec import CONTRACTS
from spark_jobs.ingest.dedupe.keys import keys_of_ids
from spark_jobs.traffic.rules import no_rules
from spark_jobs.ingest.event_columns import CAMPAIGN_SCHEMA, enrich
from tests.spark_jobs.ingest.contract.cases import LIMITS

ids = pa.table({"event_id": [f"e{n}" for n in range(2000)], "fingerprint": pa.array([0] * 2000, pa.int64())})
orders = parsed.parsed("orders", [{"order_id": f"o{n}"} for n in range(2000)])
work = [
    lambda: keys_of_ids(ids, "event_id", "fingerprint").low.tolist(),
    lambda: enrich(orders, CONTRACTS["orders"], LIMITS, CAMPAIGN_SCHEMA.empty_table(), no_rules())["key_low"].to_pylist(),
]
expected = [make() for make in work]
wrong = []

def again(at):
    try:
        for _ in range(60):
            if work[at]() != expected[at]:
                wrong.append(at)
    except Exception as error:
        wrong.append(error)

threads = [threading.Thread(target=again, args=(at,)) for at in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong, wrong[0]
"""


def test_two_streams_on_one_driver_do_not_meet_in_the_database() -> None:
    """Events may rebuild the index while orders are staged. In a process of its own: the failure was a deadlock."""
    path = [str(ROOT), str(ROOT / "tests" / "support")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{TWO_STREAMS}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
