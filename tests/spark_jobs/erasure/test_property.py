"""Any people, any traffic, any kill: an erased home counts what the same home without an erasure counts."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import correct
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lake import campaigns, event, land, order
from sparkless import ingest

from spark_jobs.attribution.job import attribute
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.erasure.job import erase, prove
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.steps import Step

NOW = datetime(2025, 6, 10, tzinfo=UTC)
IDS = ("person-1", "person-12", "u1", "ünïcode-7", 'quo"ted\\one', "a b@c.example", "1234567")
COUNTED = "user_id, fingerprint, _query_id, ingested_at"


def _line(record: dict[str, Any], style: str) -> bytes:
    """Write a record as different programs do, or break it."""
    text = json.dumps(record, ensure_ascii=style != "utf-8")
    if style == "escaped":
        text = text.replace('"user_id": "', '"user_id": "\\u0070').replace("\\u0070p", "\\u0070") if "person" in text else text
    return (text[:-4] if style == "broken" else text).encode() + b"\n"


@st.composite
def files(draw: st.DrawFn) -> list[tuple[str, bytes]]:
    """Landing files, in the order of their landing."""
    made = []
    for number in range(draw(st.integers(2, 5))):
        stream = draw(st.sampled_from(("events", "events", "orders")))
        lines = []
        for _ in range(draw(st.integers(1, 6))):
            user = draw(st.sampled_from(IDS))
            at = draw(st.integers(0, 7))
            style = draw(st.sampled_from(("ascii", "utf-8", "escaped", "broken")))
            if stream == "events":
                price, kind = draw(st.sampled_from((1000, 1000, 7))), draw(st.sampled_from(("impression", "click")))
                extra = {"note": f"for {draw(st.sampled_from(IDS))}"} if draw(st.booleans()) else {}
                lines.append(_line(event(f"e-{at}", user_id=user, price_micros=price, event_type=kind, **extra), style))
            else:
                status = draw(st.sampled_from(("placed", "placed", "cancelled", "lost")))
                lines.append(_line(order(f"o-{at}", user_id=user, status=status), style))
        packed = draw(st.booleans())
        data = b"".join(lines)
        made.append((f"{stream}/eu/{number}.jsonl{'.gz' if packed else ''}", gzip.compress(data) if packed else data))
    return made


def _home(folder: str) -> Settings:
    made = load_settings(home=Path(folder))
    ensure_tables(made)
    campaigns(made)
    return made


def _take_in(home: Settings, landed: list[tuple[str, bytes]]) -> None:
    for name, data in landed:
        land(home, name, data)
    for stream in ("events", "orders"):
        ingest(home, stream)
    attribute(home)


def _counted(home: Settings) -> dict[str, Any]:
    held = correct.contents(home, identity=False)
    return {
        "minute_metrics": held["minute_metrics"],
        "batch_ledger": held["batch_ledger"],
        "events": correct.rows(home, f"select * exclude ({COUNTED}, _batch_id, _run_id) from events"),
        "orders": correct.rows(home, f"select * exclude ({COUNTED}, _batch_id, _run_id) from orders"),
        "credits": correct.rows(home, "select order_id, revision, touch_event_id, linear_micros from attributed_orders"),
        "people": correct.rows(home, "select list_sort(list(event_id)) from events group by user_id"),
        "rejects": correct.rows(home, "select outcome, reason_codes, source_file, source_line, record_id from rejected_events"),
    }


@contextmanager
def _killed_at(call: int) -> Iterator[None]:
    """End whatever runs within at its ``call``-th crash point, as a killed process would."""
    calls = 0

    def crash_point(moment: str, step: Step, batch_id: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    with mock.patch("spark_jobs.steps.crash_point", crash_point):
        yield


@pytest.mark.homes
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    before=files(),
    after=files(),
    people=st.sets(st.sampled_from(IDS), min_size=1, max_size=3),
    kill_at=st.one_of(st.none(), st.integers(1, 60)),
)
def test_any_people_are_erased_from_any_traffic(
    before: list[tuple[str, bytes]], after: list[tuple[str, bytes]], people: set[str], kill_at: int | None
) -> None:
    later = [(name.replace("/eu/", "/eu/later-"), data) for name, data in after]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as plain:
        home, other = _home(folder), _home(plain)
        for one in (home, other):
            _take_in(one, before)
        try:
            with _killed_at(kill_at or 0):
                erase(home, sorted(people), now=NOW)
        except KeyboardInterrupt:
            assert reconcile(home, None).differences == []
        for run in erase(home, sorted(people), now=NOW):
            prove(home, run, now=NOW)
        assert _counted(home) == _counted(other)
        users = {user for (user,) in correct.rows(home, "select user_id from events union select user_id from orders")}
        assert not users & people
        for one in (home, other):
            _take_in(one, later)
        assert _counted(home) == _counted(other)
        assert reconcile(home, None).differences == []
        users = {user for (user,) in correct.rows(home, "select user_id from events union select user_id from orders")}
        assert not users & people
