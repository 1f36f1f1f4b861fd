"""What is rewritten in lines and files, and what is not."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

import correct
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lake import campaigns, event, land, lines
from sparkless import ingest

from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.erasure.job import erase, prove
from spark_jobs.erasure.lines import People, has_person, rewrite_line
from spark_jobs.erasure.suppression import Suppression
from spark_jobs.errors import AdtallyError
from spark_jobs.ingest.contract.spec import MAX_LINE_BYTES
from spark_jobs.ingest.kafka import raw
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.stamp import Stamp
from spark_jobs.lake.tables import RAW_EVENTS
from spark_jobs.lake.writes import ensure_tables

ANNA, NOW = "user-anna-0001", datetime(2025, 6, 10, tzinfo=UTC)
PEOPLE = People({ANNA: "erased-1", "17": "erased-2"})

CASES = {
    "the person": (f'{{"user_id": "{ANNA}", "x": 17}}', '{"user_id": "erased-1", "x": 17}'),
    "a short id": ('{"user_id":"17","ad_id":"17","x":17,"n":"17"}', '{"user_id":"erased-2","ad_id":"17","x":17,"n":"erased-2"}'),
    "a longer id of somebody else": (f'{{"user_id": "{ANNA}1"}}', None),
    "an id in another id": (f'{{"event_id": "{ANNA}", "user_id": "x", "note": "{ANNA}-2"}}', None),
    "in an unknown field": (f'{{"user_id": "x", "note": "by {ANNA}."}}', '{"user_id": "x", "note": "by erased-1."}'),
    "nested, under a name of the contract": (f'{{"ad_id": {{"y": ["{ANNA}"]}}}}', '{"ad_id": {"y": ["erased-1"]}}'),
    "escaped": ('{"user_id": "\\u0075ser-anna-0001"}', '{"user_id": "erased-1"}'),
    "as a name": (f'{{"{ANNA}": 1}}', '{"erased-1": 1}'),
    "twice": (f'{{"user_id": "{ANNA}", "user_id": "{ANNA}"}}', '{"user_id": "erased-1", "user_id": "erased-1"}'),
    "broken": (f'{{"user_id": "{ANNA}", ', '{"user_id": "erased-1", '),
    "no JSON": (f"GET /?u={ANNA}&x=17", "GET /?u=erased-1&x=17"),
    "hex": (f"trace={ANNA.encode().hex()};", "trace=erased-1;"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_replaced(case: str) -> None:
    before, after = (None if text is None else text.encode() for text in CASES[case])
    assert before is not None
    made = rewrite_line(before, PEOPLE)
    assert made == (before if after is None else after)
    assert has_person(before, PEOPLE) == (after is not None)
    assert not has_person(made, PEOPLE)
    assert rewrite_line(made, PEOPLE) == made


VALUES = st.recursive(
    st.text(max_size=12) | st.sampled_from((ANNA, "17")) | st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=8) | st.sampled_from(("user_id", "ad_id", ANNA)), VALUES, max_size=4))
def test_any_record_stays_one_and_has_nobody(record: dict[str, object]) -> None:
    for text in (json.dumps(record), json.dumps(record, ensure_ascii=False), json.dumps(record)[:-2]):
        data = text.encode("utf-8", "replace")
        made = rewrite_line(data, PEOPLE)
        assert not has_person(made, PEOPLE)
        if text == json.dumps(record):
            assert len(json.loads(made)) <= len(record)


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    """A home without records."""
    made = load_settings(home=tmp_path / "home")
    ensure_tables(made)
    campaigns(made)
    return made


def _erased(home: Settings) -> None:
    for run in erase(home, [ANNA], now=NOW):
        prove(home, run, now=NOW)


@pytest.mark.homes
def test_files_that_end_wrongly_still_do(home: Settings) -> None:
    data = lines([event(f"e{n}", user_id=(ANNA, "other-user")[n % 2], note="x" * n) for n in range(300)])
    packed = gzip.compress(data)
    land(home, "events/eu/truncated.jsonl.gz", packed[:-40])
    land(home, "events/eu/corrupt.jsonl.gz", packed[:-8] + b"\0" * 8)
    land(home, "events/eu/garbage.jsonl.gz", packed + b"garbage")
    land(home, "events/eu/invalid.jsonl.gz", packed[:1200] + bytes(byte ^ 0x5A for byte in packed[1200:]))
    land(home, "events/eu/two.jsonl.gz", packed + gzip.compress(lines([event("f", user_id=ANNA)])) + b"\0\0")
    land(home, "events/eu/unended.jsonl", lines([event("g", user_id=ANNA)]) + f'{{"user_id": "{ANNA}"'.encode())
    ingest(home, "events")
    rejected = "select source_file, source_line, reason_codes from rejected_events"
    before = correct.rows(home, rejected)
    assert {reason for _, _, reasons in before for reason in reasons} >= {"truncated_gzip", "corrupt_gzip", "unterminated_line"}
    assert reconcile(home, None).differences == []
    _erased(home)
    assert reconcile(home, None).differences == []
    assert correct.rows(home, rejected) == before
    fresh = load_settings(home=home.home_path.with_name("fresh"), landing=home.landing_path)
    ensure_tables(fresh)
    ingest(fresh, "events")
    assert correct.rows(fresh, rejected) == before, "a new home reads the rewritten files as the first one read the old ones"


@pytest.mark.homes
def test_a_line_that_would_become_too_long_is_refused(home: Settings) -> None:
    def line(size: int) -> bytes:
        record = event("e", user_id="anna-1", note="")
        return lines([{**record, "note": "x" * (size - len(json.dumps(record)))}])

    land(home, "events/eu/a.jsonl", line(MAX_LINE_BYTES) + line(MAX_LINE_BYTES + 1))
    with pytest.raises(AdtallyError, match="more than a line may have"):
        erase(home, ["anna-1"], now=NOW)
    land(home, "events/eu/a.jsonl", line(MAX_LINE_BYTES - 20) + line(MAX_LINE_BYTES + 1))
    (report,) = ingest(home, "events")
    assert (report.accepted, report.rejected) == (1, 1)
    for run in erase(home, ["anna-1"], now=NOW):
        prove(home, run, now=NOW)
    assert reconcile(home, None).differences == []


def test_raw_records_of_a_topic_are_rewritten(home: Settings) -> None:
    values = (lines([event("e1", user_id=ANNA)])[:-1], f"broken {ANNA}".encode())
    rows = ", ".join(f"('{value.decode()}'::blob, {offset})" for offset, value in enumerate(values))
    columns = "'eu' as cluster, 'ad-events' as source_topic, 0::int as source_partition, source_offset::bigint as source_offset"
    times = "now() as source_timestamp, value, now() as ingested_at, today() as ingested_date"
    correct.append(home, "raw_events", f"select {columns}, {times} from (values {rows}) v(value, source_offset)")
    _erased(home)
    found = [row["value"] for row in correct.select(home, "select value from raw_events order by source_offset").to_pylist()]
    assert json.loads(found[0])["user_id"].startswith("erased-")
    assert found[1].startswith(b"broken erased-")


def test_the_copy_of_a_topic_applies_the_list(home: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    suppression = Suppression(b"k" * 32, {}).plus({ANNA: "erased-1"})
    values = [lines([event("e1", user_id=ANNA)])[:-1], None, b"no JSON"]
    part = raw.Slice("kafka/eu/ad-events/0", 0, 3, {})
    table = pa.table(
        {
            "cluster": ["eu"] * 3,
            "source_topic": ["ad-events"] * 3,
            "source_partition": pa.array([0] * 3, pa.int32()),
            "source_offset": [0, 1, 2],
            "source_timestamp": pa.array([0] * 3, pa.timestamp("ms", "UTC")),
            "value": pa.array(values, pa.binary()),
        }
    )
    monkeypatch.setattr(raw, "read_slice", lambda _: iter([table]))
    uri = Lake(home).uri(RAW_EVENTS)
    for known, name in ((suppression, "erased-1"), (None, ANNA)):
        files = raw.copy_slices([part], RAW_EVENTS, uri, Stamp("q", 0, 0), known)
        (kept,) = (Lake(home).read_files(RAW_EVENTS, [file.path], "value")["value"].to_pylist() for file in files)
        assert json.loads(kept[0])["user_id"] == name
        assert kept[1:] == [None, b"no JSON"]
