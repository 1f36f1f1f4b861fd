"""Closing hours: what the sources' progress closes, what it must not close, and what an operator closes by hand."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import lake
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import SparkSession

from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import UsageError
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.lake.tables import BATCH_LEDGER, HOUR_CLOSINGS
from spark_jobs.operate.watermark import Closing, close_by_hand, read_closing, require_closed
from spark_jobs.units import HourRange

pytestmark = pytest.mark.homes


def at(text: str) -> datetime:
    """A time of 2025-06-02."""
    return datetime.fromisoformat(f"2025-06-02T{text}+00:00")


def booked(settings: Settings, *rows: dict[str, Any]) -> None:
    """Rows of the ledger; by default of the events of eu, ingested long after they were received."""
    default = {
        "stream": "events",
        "source": "files",
        "region": "eu",
        "offered": 1,
        "accepted": 1,
        "event_hour": at("08:00"),
        "ingested_at": at("23:00"),
        "_query_id": "q",
        "_batch_id": 0,
    }
    table = pa.Table.from_pylist([{**default, **row} for row in rows], BATCH_LEDGER.schema)
    write_deltalake(settings.table_uri("batch_ledger"), table, mode="append")


def progress(moment: str, **changes: Any) -> dict[str, Any]:
    return {"max_received_at": at(moment), **changes}


def closed(closing: Closing) -> str | None:
    return None if closing.closed_through is None else f"{closing.closed_through:%H:%M}"


US = {"region": "us"}
ORDERS = {"stream": "orders"}
CASES: dict[str, tuple[list[dict[str, Any]], str | None]] = {
    "nothing_ingested": ([], None),
    "an hour and its grace must have passed": ([progress("10:14:59.999999")], "09:00"),
    "to the microsecond": ([progress("10:15:00")], "10:00"),
    "the slowest source counts": ([progress("18:30"), progress("10:15", **US)], "10:00"),
    "of any stream": ([progress("18:30"), progress("11:20", **ORDERS)], "11:00"),
    "the newest row of a source counts": ([progress("12:30"), progress("09:30", _batch_id=1)], "12:00"),
    "a clock that runs ahead is capped by the time of ingestion": ([progress("22:59", ingested_at=at("10:20"))], "10:00"),
    "capped row by row": ([progress("22:59", ingested_at=at("10:20")), progress("11:30", ingested_at=at("12:00"))], "11:00"),
    "only rejects are no progress": ([progress("10:15"), {"accepted": 0, "rejected": 1, "max_received_at": None, **US}], "10:00"),
    "nothing but rejects closes nothing": ([{"accepted": 0, "max_received_at": None}], None),
    "a correction does not move a source": ([progress("10:15"), {"max_received_at": None, "_run_id": "r"}], "10:00"),
    "nor does it make one": ([progress("10:15"), {"max_received_at": None, "_run_id": "r", **US}], "10:00"),
    "a row that a repair wrote in place of a lost one does": ([progress("10:15"), progress("09:30", _run_id="r", **US)], "09:00"),
    "orders alone close nothing": ([progress("18:30", **ORDERS)], None),
    "nor do orders whose events are all rejected": ([progress("18:30", **ORDERS), {"accepted": 0, "max_received_at": None}], None),
    "midnight": ([progress("00:15")], "00:00"),
}


@pytest.mark.parametrize("rows, through", CASES.values(), ids=CASES)
def test_hours_close_by_the_progress_of_the_sources(settings: Settings, rows: list[dict[str, Any]], through: str | None) -> None:
    if rows:
        booked(settings, *rows)
    closing = read_closing(settings)
    assert closed(closing) == through
    assert closing.by_hand_through is None
    if closing.closed_through is not None:
        last = closing.closed_through - timedelta(hours=1)
        assert closing.is_closed(last)
        assert not closing.is_closed(closing.closed_through)


def test_the_grace_is_a_setting(settings: Settings) -> None:
    booked(settings, progress("12:30"))
    assert closed(read_closing(settings.model_copy(update={"hour_grace": timedelta(0)}))) == "12:00"
    assert closed(read_closing(settings.model_copy(update={"hour_grace": timedelta(hours=2)}))) == "10:00"


def test_no_home_is_like_an_empty_one(settings: Settings) -> None:
    assert read_closing(load_settings(home=settings.home_path / "nowhere")) == Closing() == read_closing(settings)
    assert not Closing().is_closed(at("01:00"))


def test_the_first_hour_is_that_of_an_accepted_record(settings: Settings) -> None:
    hours = ((at("09:00"), 1), (at("07:00"), 0), (None, 0), (at("08:00"), 2))
    booked(settings, *({"event_hour": hour, "accepted": count} for hour, count in hours))
    assert read_closing(settings).first_hour == at("08:00")


def test_silent_and_retired_sources_are_named(settings: Settings) -> None:
    booked(settings, progress("18:00"), progress("17:00", **US), progress("16:59", region="ap"), progress("09:00", **ORDERS))
    booked(settings, {"region": "only-rejects", "accepted": 0, "max_received_at": None, "ingested_at": at("12:00")})
    closing = read_closing(settings)
    assert [source.name for source in closing.silent] == ["events/ap", "orders/eu"]
    assert [source.name for source in closing.sources] == [
        *("events/ap", "events/eu", "events/only-rejects", "events/us", "orders/eu")
    ]
    assert closing.sources[2].progress_at is None
    assert closing.sources[2].last_ingested_at == at("12:00")
    assert closed(closing) == "08:00"

    retired = settings.model_copy(update={"retired_sources": ("orders/eu", "events/ap", "events/never-seen")})
    closing = read_closing(retired)
    assert [source.name for source in closing.sources if source.is_retired] == ["events/ap", "orders/eu"]
    assert not closing.silent
    assert closed(closing) == "16:00"


def test_a_retired_source_that_is_ahead_makes_nobody_silent(settings: Settings) -> None:
    booked(settings, progress("10:00"), progress("18:00", **US))
    closing = read_closing(settings.model_copy(update={"retired_sources": ("events/us",)}))
    assert not closing.silent
    assert closed(closing) == "09:00"


def test_closing_by_hand(settings: Settings) -> None:
    booked(settings, progress("18:30"), progress("10:30", **US))
    closing = close_by_hand(settings, at("12:00"), reason=" us is down ", closed_by="ada", now=at("19:00"))
    assert (closed(closing), closing.by_hand_through) == ("12:00", at("12:00"))
    assert [source.name for source in closing.silent] == ["events/us"]
    row = DeltaTable(settings.table_uri(HOUR_CLOSINGS.name)).to_pyarrow_table().to_pylist()[0]
    assert (row["reason"], row["closed_by"], row["closed_at"]) == ("us is down", "ada", at("19:00"))

    booked(settings, progress("13:30", _batch_id=1, **US))  # it speaks again and passes the decision
    assert closed(read_closing(settings)) == "13:00"
    assert read_closing(settings).by_hand_through == at("12:00")
    close_by_hand(settings, at("18:00"), reason="down again", closed_by="ada", now=at("19:00"))
    assert closed(read_closing(settings)) == "18:00"


REFUSED = {
    "not a whole hour": (at("12:30"), "whole hour"),
    "no zone": (datetime(2025, 6, 2, 12), "whole hour"),
    "in the future": (at("20:00"), "future"),
    "closed already": (at("10:00"), "closed already"),
    "closed long since": (at("03:00"), "closed already"),
}


@pytest.mark.parametrize("through, message", REFUSED.values(), ids=REFUSED)
def test_a_wrong_closing_by_hand_changes_nothing(settings: Settings, through: datetime, message: str) -> None:
    booked(settings, progress("18:30"), progress("10:30", **US))
    with pytest.raises(UsageError, match=message):
        close_by_hand(settings, through, reason="why not", closed_by="ada", now=at("19:00"))
    for wrong in ({"reason": " ", "closed_by": "ada"}, {"reason": "why not", "closed_by": ""}):
        with pytest.raises(UsageError, match="reason"):
            close_by_hand(settings, at("12:00"), **wrong, now=at("19:00"))
    assert read_closing(settings).by_hand_through is None


def test_require_closed_names_the_first_open_hour_and_who_is_silent(settings: Settings) -> None:
    with pytest.raises(UsageError, match=r"2025-06-02T08Z is not closed \(no hour is closed yet\)"):
        require_closed(settings, HourRange.of(at("08:00")))
    booked(settings, progress("18:30"), progress("10:30", **US))
    require_closed(settings, HourRange(at("01:00"), at("10:00")))
    with pytest.raises(UsageError, match=r"2025-06-02T10Z is not closed \(closed through 2025-06-02T10Z; silent: events/us"):
        require_closed(settings, HourRange(at("08:00"), at("12:00")))


def landed(settings: Settings, name: str, moment: str) -> None:
    path = lake.land(settings, name, [])
    os.utime(path, times=(at(moment).timestamp(),) * 2)


def test_a_region_whose_first_files_are_yet_to_be_read_holds_hours_open(settings: Settings) -> None:
    booked(settings, progress("18:30"), progress("18:30", **ORDERS))
    for name in ("events/us/.tmp.jsonl", "events/us/note.txt", "events/_old/1.jsonl", "events/loose.jsonl", "events/eu/2.jsonl"):
        landed(settings, name, "09:30")  # no region has come by these that was not read
    assert closed(read_closing(settings)) == "18:00"
    landed(settings, "events/us/1.jsonl.gz", "12:20")
    landed(settings, "events/us/2.jsonl", "11:20")
    landed(settings, "orders/us/1.jsonl", "12:20")
    closing = read_closing(settings)
    assert closed(closing) == "11:00"  # as it will be when the oldest is read, which is the first to be
    assert [source.name for source in closing.sources if source.is_awaited] == ["events/us", "orders/us"]
    assert not closing.silent
    with pytest.raises(UsageError, match=r"closed through 2025-06-02T11Z; landed and not ingested yet: events/us, orders/us\)"):
        require_closed(settings, HourRange.of(at("11:00")))
    retired = settings.model_copy(update={"retired_sources": ("events/us", "orders/us")})
    assert closed(read_closing(retired)) == "18:00"
    booked(settings, progress("14:15", **US), progress("14:30", **US, **ORDERS))
    assert closed(read_closing(settings)) == "14:00"


def test_nothing_closes_before_an_event_was_read(settings: Settings) -> None:
    landed(settings, "events/eu/1.jsonl", "09:20")
    landed(settings, "events/us/1.jsonl", "10:20")
    assert closed(read_closing(settings)) is None
    booked(settings, progress("18:30", **ORDERS))
    assert closed(read_closing(settings)) is None
    booked(settings, progress("12:30", **US))
    assert closed(read_closing(settings)) == "09:00"


def test_a_home_of_an_older_adtally(settings: Settings) -> None:
    """Its ledger has no _run_id and its lakehouse no hour_closings."""
    home = load_settings(home=settings.home_path / "older")
    booked(home, progress("10:15"))
    uri = home.table_uri("batch_ledger")
    rows = DeltaTable(uri).to_pyarrow_table().drop_columns(["_run_id"])
    write_deltalake(uri, rows, mode="overwrite", schema_mode="overwrite")
    assert "_run_id" not in {field.name for field in DeltaTable(uri).schema().fields}
    assert closed(read_closing(home)) == "10:00"
    assert closed(close_by_hand(home, at("11:00"), reason="older", closed_by="ada", now=at("12:00"))) == "11:00"


def test_a_real_ledger(spark: SparkSession, settings: Settings) -> None:
    lake.campaigns(settings)
    lake.land(settings, "events/eu/1.jsonl", [lake.event("e1"), lake.event("e2", received_at="2025-06-02T12:20:00Z"), {"bad": 1}])
    lake.land(settings, "orders/eu/1.jsonl", [lake.order("o1")])
    run_ingest(settings, spark=spark)
    closing = read_closing(settings)
    assert closing.first_hour == at("10:00")
    assert {(source.name, source.progress_at) for source in closing.sources} == {
        ("events/eu", at("12:20:00")),
        ("orders/eu", at("11:00:01")),
    }
    assert closed(closing) == "10:00"

    # a sender whose clock is years ahead: what it says counts up to now, and now is a time that others have not reached
    lake.land(settings, "events/eu/2.jsonl", [lake.event("e3", received_at="2999-01-01T00:00:00Z")])
    run_ingest(settings, spark=spark)
    ahead = read_closing(settings)
    assert closed(ahead) == "10:00"
    newest = max(source.progress_at for source in ahead.sources if source.progress_at is not None)
    assert newest <= datetime.now(UTC)


def test_a_ledger_of_many_files_is_read_fast(settings: Settings) -> None:
    for number in range(60):
        booked(settings, *(progress("10:15", region=f"r{i}", _batch_id=number) for i in range(30)))
    read_closing(settings)
    started = time.perf_counter()
    assert closed(read_closing(settings)) == "10:00"
    assert time.perf_counter() - started < 1
