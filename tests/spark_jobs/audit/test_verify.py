"""Chained tables, their verification by the auditor, and hands that tamper with them."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from operator import itemgetter
from pathlib import Path
from typing import Any

import correct
import lake
import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable, write_deltalake
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from killed import run_code
from local import LocalEvents

from spark_jobs.audit.chain import CHAINED, Fault, NotedHead, hash_of, read_chain
from spark_jobs.audit.verify import VerifyReport, verify
from spark_jobs.billing.job import bill
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import UsageError
from spark_jobs.ingest.campaigns import load_campaigns
from spark_jobs.lake.chain import Head, link, row_hash
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import BILLING_LINES, CHAIN_COLUMNS, HOUR_CLOSINGS, TABLES
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.watermark import close_by_hand
from spark_jobs.steps import CRASH_VARIABLE, Step

NOW = datetime(2025, 6, 10, tzinfo=UTC)


@pytest.fixture(scope="module")
def billed(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A home with two billed days of one store, and a credit; nobody changes it."""
    made = load_settings(home=tmp_path_factory.mktemp("verify") / "home")
    ensure_tables(made)
    lake.campaigns(made)
    load_campaigns(made)
    batches = LocalEvents(made)
    for day in (2, 3):
        times = {"event_time": f"2025-06-0{day}T10:00:00Z", "received_at": f"2025-06-0{day}T10:00:01Z"}
        clicks = [lake.event(f"k{day}-{n}", event_type="click", campaign_id="c-cpc", user_id=f"u{n}", **times) for n in range(3)]
        batches.take([lake.event(f"i{day}", **times), *clicks])
    close_by_hand(made, datetime(2025, 6, 4, tzinfo=UTC), reason="test", closed_by="me", now=NOW)
    bill(made, run_id="r1", now=NOW)
    batches.take([lake.event("late", event_type="click", campaign_id="c-cpc", user_id="u9", price_micros=700)])
    bill(made, run_id="r2", now=NOW)
    return made


@pytest.fixture
def home(billed: Settings, tmp_path: Path) -> Settings:
    return correct.copied(billed, tmp_path / "home")


def checked(home: Settings, **options: Any) -> VerifyReport:
    return verify(home, now=NOW, **options)


def rows_of(home: Settings) -> list[dict[str, Any]]:
    rows = Lake(home).rows(BILLING_LINES).to_pylist()
    return sorted(rows, key=lambda row: row["chain_position"])


def rewrite(home: Settings, rows: list[dict[str, Any]]) -> None:
    """Replace all lines, as one who may write to the lakehouse can; no commit of adtally tells it."""
    write_deltalake(DeltaTable(home.table_uri("billing_lines")), pa.Table.from_pylist(rows, BILLING_LINES.schema), mode="overwrite")


def test_what_was_billed_is_what_came_in(home: Settings) -> None:
    report = checked(home)
    assert report.findings == []
    assert (report.lines, report.days, report.pending) == (5, [date(2025, 6, 2), date(2025, 6, 3)], [])
    assert [head.split(":")[:2] for head in report.heads] == [["billing_lines", "5"], ["hour_closings", "1"], ["audit_log", "2"]]
    assert [row["amount_micros"] for row in rows_of(home)] == [4500, 2, 4500, 2, 700]


def _amount(rows: list[dict[str, Any]]) -> None:
    rows[2]["amount_micros"] += 100


def _whole(rows: list[dict[str, Any]]) -> None:
    """A line and all that follows from it, but for the hashes."""
    rows[2] |= {"amount_micros": Decimal(9), "billed_micros": Decimal(9), "spend_nanos": Decimal(9000)}


def _remove(rows: list[dict[str, Any]]) -> None:
    del rows[2]


def _remove_last(rows: list[dict[str, Any]]) -> None:
    del rows[-1]


def _insert(rows: list[dict[str, Any]]) -> None:
    rows.append({**rows[2], "line_id": "forged"})


def _insert_unchained(rows: list[dict[str, Any]]) -> None:
    rows.append({**rows[2], "line_id": "forged", **dict.fromkeys(CHAIN_COLUMNS)})


def _swap(rows: list[dict[str, Any]]) -> None:
    rows[1]["chain_position"], rows[2]["chain_position"] = rows[2]["chain_position"], rows[1]["chain_position"]


def _rehash(rows: list[dict[str, Any]]) -> None:
    """The line gets the right hash of its new content; the line after it names another."""
    _whole(rows)
    rows[2]["row_hash"] = row_hash("billing_lines", rows[2]["previous_hash"], rows[2])


@pytest.mark.parametrize(
    ("tamper", "fault", "position", "expected"),
    [
        (_amount, Fault.CHANGED, 3, 4500),
        (_whole, Fault.CHANGED, 3, 4500),
        (_remove, Fault.REMOVED, 3, None),
        (_remove_last, Fault.REMOVED, 5, None),
        (_insert, Fault.INSERTED, 3, None),
        (_insert_unchained, Fault.INSERTED, None, None),
        (_swap, Fault.REORDERED, 2, None),
        (_rehash, Fault.REMOVED, 3, None),
    ],
)
def test_the_first_line_that_breaks_the_chain_is_named(
    home: Settings, tamper: Callable[[list[dict[str, Any]]], None], fault: Fault, position: int | None, expected: int | None
) -> None:
    rows = rows_of(home)
    tamper(rows)
    rewrite(home, rows)
    first = checked(home, recounts=expected is not None).findings[0]
    assert (first.check, first.kind, first.position) == ("chain", fault, position)
    if expected is not None:
        assert (first.row_id, first.amount_found, first.amount_expected) == (rows[2]["line_id"], rows[2]["amount_micros"], expected)


def test_a_rewritten_chain_is_noticed_by_a_noted_head_and_by_the_recount(home: Settings) -> None:
    before = [str(head) for head in checked(home).heads]
    assert checked(home, expect=before).findings == []
    rows = rows_of(home)
    _whole(rows)
    table, head = link(BILLING_LINES, Head(), rows)
    metadata = json.dumps({"chain": {"position": head.position, "hash": head.hash}, "billing": {"run_id": "x", "place": None}})
    write_deltalake(
        DeltaTable(home.table_uri("billing_lines")),
        table,
        mode="overwrite",
        commit_properties=CommitProperties(custom_metadata={"userMetadata": metadata}),
    )
    without = checked(home, recounts=False)
    assert without.findings == []  # the chain alone cannot know
    found = checked(home)
    assert [(one.check, one.row_id, one.amount_found, one.amount_expected) for one in found.findings] == [
        ("recount", rows[2]["line_id"], 9, 4500)
    ]
    found = checked(home, expect=before[:1], recounts=False)
    assert [(one.kind, one.position) for one in found.findings] == [(Fault.REWRITTEN, 5)]
    with pytest.raises(UsageError, match="no head"):
        checked(home, expect=["billing_lines:x"])


def test_a_later_posting_still_contains_an_earlier_head(home: Settings) -> None:
    before = checked(home).heads
    LocalEvents(home, "more").take([lake.event("later", event_type="click", campaign_id="c-cpc", user_id="u8", price_micros=900)])
    assert checked(home).pending == [date(2025, 6, 2)]
    bill(home, run_id="r3", now=NOW)
    report = checked(home, expect=before)
    assert (report.findings, report.lines) == ([], 6)


def test_closings_and_acts_are_chained_too(home: Settings) -> None:
    for day in (5, 6):
        close_by_hand(home, datetime(2025, 6, day, tzinfo=UTC), reason="r", closed_by="me", now=NOW)
    assert checked(home).findings == []
    correct.update(home, "hour_closings", f"chain_position = {2}", reason="'another'")
    correct.delete(home, "audit_log", "chain_position = 2")
    assert [(one.table, one.kind, one.position) for one in checked(home).findings] == [
        ("hour_closings", Fault.CHANGED, 2),
        ("audit_log", Fault.REMOVED, 2),
    ]


def test_lines_of_an_older_adtally_are_chained_by_the_next_posting_without_another_value(home: Settings) -> None:
    amounts = [{name: value for name, value in row.items() if name not in CHAIN_COLUMNS} for row in rows_of(home)]
    for name in ("billing_lines", "hour_closings"):
        table = DeltaTable(home.table_uri(name))
        rows = table.to_pyarrow_table().drop_columns(list(CHAIN_COLUMNS))
        place = next(
            (c.metadata["billing"] for c in DeltaLog(home.table_uri(name)).commits_backwards() if "billing" in c.metadata), None
        )
        for file in Path(home.table_uri(name)).rglob("*.parquet"):
            file.unlink()
        for file in (Path(home.table_uri(name)) / "_delta_log").iterdir():
            file.unlink()
        metadata = {} if place is None else {"userMetadata": json.dumps({"billing": place | {"place": None}})}
        properties = CommitProperties(custom_metadata=metadata)
        write_deltalake(home.table_uri(name), rows, commit_properties=properties)
    assert [(one.table, one.kind) for one in checked(home).findings] == [
        ("billing_lines", "unchained"),
        ("hour_closings", "unchained"),
    ]
    bill(home, run_id="r3", now=NOW)
    close_by_hand(home, datetime(2025, 6, 5, tzinfo=UTC), reason="r", closed_by="me", now=NOW)
    assert checked(home).findings == []
    after = [{name: value for name, value in row.items() if name not in CHAIN_COLUMNS} for row in rows_of(home)]
    assert sorted(after, key=itemgetter("line_id")) == sorted(amounts, key=itemgetter("line_id"))
    anchored = [
        c for c in DeltaLog(home.table_uri("billing_lines")).commits_backwards() if "anchored" in c.metadata.get("chain", {})
    ]
    assert [commit.metadata["chain"]["anchored"] for commit in anchored] == [5]
    assert not anchored[0].changes_rows
    bill(home, run_id="r4", now=NOW)
    assert len([c for c in DeltaLog(home.table_uri("billing_lines")).commits_backwards() if "chain" in c.metadata]) == 1


def _statement(home: Settings, path: Path, **changed: Any) -> Path:
    lines = [
        {"event_date": row["event_date"], "campaign_id": row["campaign_id"], "line_type": row["line_type"], "currency": "EUR"}
        | {"amount": f"{row['amount_micros'] / 10**6:.2f}", "reason": row["reason"].replace("_", " "), "line_id": row["line_id"]}
        | {"run_id": row["run_id"], "mart_build_id": "b", "console_filters": "s-1"}
        for row in rows_of(home)
    ]
    lines[0] |= changed
    path.write_text("\n".join([",".join(lines[0]), *(",".join(map(str, line.values())) for line in lines)]) + "\n")
    return path


def test_a_statement_is_compared_line_by_line(home: Settings, tmp_path: Path) -> None:
    path = tmp_path / "statement.csv"
    report = checked(home, statement=_statement(home, path), recounts=False)
    assert (report.findings, report.statement_lines) == ([], 5)
    found = checked(home, statement=_statement(home, path, amount="1.00"), recounts=False).findings
    assert [(one.check, one.position, one.detail) for one in found] == [("statement", 1, "amount is 1.00, posted was 0.00")]
    found = checked(home, statement=_statement(home, path, line_id="none"), recounts=False).findings
    assert [one.detail for one in found] == [
        "the line was never posted, or was removed from the table",
        "the statement lacks the line",
    ]
    text = path.read_text().splitlines()
    path.write_text("\n".join([*text, text[-1]]))
    assert "the statement has the line twice" in [one.detail for one in checked(home, statement=path, recounts=False).findings]
    as_json = tmp_path / "lines.json"
    as_json.write_text(
        json.dumps([{"line_id": row["line_id"], "amount_micros": int(row["amount_micros"])} for row in rows_of(home)[:2]])
    )
    assert checked(home, statement=as_json, recounts=False).findings == []
    for content in ("", "[]x", '[{"a": 1}]', "[" * 100_000):
        as_json.write_text(content)
        with pytest.raises(UsageError):
            checked(home, statement=as_json, recounts=False)


def test_an_empty_home_has_nothing_to_verify(tmp_path: Path) -> None:
    home = load_settings(home=tmp_path / "none")
    report = checked(home)
    assert (report.findings, report.heads, report.lines) == ([], [], 0)
    assert not home.home_path.exists()


def test_a_head_is_a_text() -> None:
    head = NotedHead("billing_lines", 3, "a" * 64)
    assert NotedHead.parse(str(head)) == head


ROWS = st.dictionaries(
    st.sampled_from(["line_id", "reason", "posting", "event_date", "billed_at", "amount_micros", "store_id", "row_hash"]),
    st.one_of(
        st.none(),
        st.text(st.characters(exclude_categories=["Cs"])),
        st.integers(-(10**30), 10**30),
        st.dates(),
        st.datetimes(timezones=st.just(UTC)),
        st.integers(-(10**37), 10**37).map(Decimal),
    ),
)


@hypothesis_settings(max_examples=300, deadline=None)
@given(row=ROWS, previous=st.text("0123456789abcdef", min_size=64, max_size=64))
def test_writer_and_auditor_agree_on_the_hash_of_any_row(row: dict[str, Any], previous: str) -> None:
    assert row_hash("billing_lines", previous, row) == hash_of("billing_lines", previous, row)


def test_the_stated_form_of_a_row() -> None:
    """As docs/tamper-evidence.md states it, by nothing but hashlib and json."""
    row = {"closed_through": datetime(2025, 6, 4, tzinfo=UTC), "reason": "é\n", "closed_by": None, "chain_position": 7}
    text = '{"chain":"hour_closings","previous":"%s","row":{"closed_through":"2025-06-04T00:00:00.000000Z","reason":"é\\n"}}' % (
        "0" * 64
    )
    assert row_hash(HOUR_CLOSINGS.name, "0" * 64, row) == hashlib.sha256(text.encode()).hexdigest()


def test_the_auditor_reads_the_tables_that_are_chained(home: Settings) -> None:
    assert {table.name for table in CHAINED} == {table.name for table in TABLES.values() if "row_hash" in table.types}
    assert all(not read_chain(Lake(home), table).faults for table in CHAINED)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_older_lines_are_chained_the_next_posting_chains_them_once(home: Settings, moment: str) -> None:
    uri = home.table_uri("billing_lines")
    rows = DeltaTable(uri).to_pyarrow_table().drop_columns(list(CHAIN_COLUMNS))
    shutil.rmtree(uri)
    write_deltalake(uri, rows)
    code = "from spark_jobs.config import load_settings; from spark_jobs.billing.job import bill; bill(load_settings())"
    environment = {"ADTALLY_HOME": str(home.home_path), CRASH_VARIABLE: f"{moment}:{Step.CHAINED}:0"}
    assert run_code(code, **environment) == -signal.SIGKILL
    bill(home, now=NOW)
    assert checked(home, recounts=False).findings == []
    assert [row["chain_position"] for row in rows_of(home)] == [1, 2, 3, 4, 5]
