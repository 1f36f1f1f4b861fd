"""What a person sees in terminals of 60, 80 and 120 columns: captures to read, and that no key and no number is ever cut.

The captures lie in tests/cases/terminal, a file a report and width. One that is missing is written, and its test fails once.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from terminal import ROOT

from orchestration.cli import demo_report
from orchestration.cli.compare import comparison_tables
from orchestration.cli.maintenance_tables import (
    backfill_table,
    closing_tables,
    compaction_table,
    reconciliation_table,
    runs,
    vacuum_table,
)
from orchestration.cli.publish import budget_tables
from orchestration.cli.settlement import billing_table, review_table
from orchestration.cli.status import status_tables
from orchestration.cli.tables import RecordTable
from orchestration.compare.comparison import Cell, Comparison, Line
from orchestration.demo import MONEY
from services.budget.report import BudgetStatus, CampaignSpend
from spark_jobs.audit.compare import Difference
from spark_jobs.billing.job import BillingLine, BillingReport
from spark_jobs.corrections.backfill import BackfillReport, Restated
from spark_jobs.corrections.reconcile import ReconcileReport
from spark_jobs.ingest.files.backlog import IgnoredFiles, WaitingFiles
from spark_jobs.ingest.kafka.topics import TopicSource
from spark_jobs.operate.compact import CompactReport, TableCompaction
from spark_jobs.operate.status import QuarantinedFile, SourceStatus, Status, TableStatus
from spark_jobs.operate.vacuum import TableVacuum, VacuumReport
from spark_jobs.operate.watermark import Closing, SourceProgress
from spark_jobs.publish.progress import TopicStatus
from spark_jobs.traffic.review import ReviewedHour, ReviewReport

CAPTURES = ROOT / "tests" / "cases" / "terminal"
WIDTHS = (60, 80, 120)
NOON = datetime(2026, 11, 28, 12, 0, 7, tzinfo=UTC)
DAY = date(2026, 11, 28)


def status() -> Iterable[RenderableType]:
    def source(stream: str, kind: str, region: str, offered: int, lag: float) -> SourceStatus:
        counts = (offered, offered - 13_219, 8_573, 1_204, 3_442, 20_518)
        return SourceStatus(stream, kind, region, *counts, lag, 41, NOON, clock_ahead_seconds=93.0 if region == "us-east" else None)

    return status_tables(
        Status(
            sources=[
                source("events", "files", "ap-southeast-2", 146_037, 221_065_815.0),
                source("events", "kafka", "us-east", 9_007_199_254_740_993, 3.2),
                source("orders", "files", "eu-west", 13_219, 61.0),
            ],
            tables=[
                TableStatus("events", 1_204, 249_698, 37, 18_734_912),
                TableStatus("minute_metrics", 1_204, 9_007_199_254_740_993, 12_345, 2_734_912_000_000),
            ],
            quarantined_files=[
                QuarantinedFile("events/eu-west/part-0007-of-a-rather-long-run-of-exports.jsonl.gz", ["too_large_unpacked"], NOON),
                QuarantinedFile("orders/us-east/x.jsonl.gz", ["corrupt_gzip", "unterminated_line"], NOON),
            ],
            topics=[
                TopicSource("eu", "events", "kafka://eu/ad-events", {0: 1_234_567}, {0: 1_234_000}, {0: 1_234_600}),
                TopicSource("us", "orders", "kafka://us/orders", {0: 5}, {0: 5}, None, 1, 17, "us does not answer: timed out"),
            ],
            publications=[TopicStatus("minute_metrics", "ads-metrics", "eu", 1_190, 1_204, 14, 31.0, 1_234_567)],
            waiting=[WaitingFiles("events", "eu-west", 1_234, NOON, "events/eu-west/part-0008.jsonl")],
            ignored=[IgnoredFiles("events/eu-west", "other_ending", "no .jsonl or .jsonl.gz: not read", 3, ["a.csv", "b.json"])],
            problems=["batch 7 of orders is incomplete; it will be finished by the next ingest"],
        )
    )


def demonstration() -> Iterable[RenderableType]:
    micros = (10_914_438_529, 5_431_000_000)
    money = {
        f"{name} {code}": (micro * 1000, micro * 1000, 0)
        for name in MONEY
        for code, micro in zip(("USD", "JPY"), micros, strict=True)
    }
    counts = {"offered": (261_037, 261_037, 0), "duplicate": (8_573, 8_570, 2)} | money
    return [
        demo_report.conservation_table([("eu-west", 146_037, 139_402, 4_611, 604, 1_420, 20_518), ("us-east", 7, 4, 1, 1, 1, 0)]),
        demo_report.figures_table("Against the known truth, per hour and region, per campaign, per bill of a day", counts),
        demo_report.net_table([("JPY", 12_345, 678, 5_431_000_000, 12, 3, 44_000_000), ("USD", 1, 1, 676_200_001, 0, 0, 0)]),
        demo_report.campaigns_table([("c00017", "JPY", 12_345, 678, 5_431_000_000), ("c00003", "USD", 1, 1, 676_200_000)]),
        demo_report.verdict(counts),
    ]


def maintenance() -> Iterable[RenderableType]:
    compacted = TableCompaction("events", "p", 1_234, 2, 734_912_000, 600_000_000, 249_698, "", 3, 4, 1.0)
    kept = [*range(3, 40), 44, 46, 47]
    yield from compaction_table(CompactReport([compacted], 12.5))
    yield from vacuum_table(
        VacuumReport(
            [TableVacuum("minute_metrics", 1_234, 734_912_000, kept, {}, []), TableVacuum("orders", 0, 0, [], {}, [])], True, 1
        )
    )
    found = Difference(NOON, "minute_metrics", "increment_missing", "c00017", 3, 12_345, 12_342, 10**12, 7 * 10**11, False, "")
    yield from reconciliation_table(ReconcileReport("r1", [], [found], {}, 7.0))
    yield from backfill_table(
        BackfillReport("b1", True, [Restated(DAY, "c00017", "JPY", 12, -3, 4, 5_431 * 10**9, 5_500 * 10**9)], 3, 21.0)
    )
    sources = [SourceProgress("events", "kafka", "ap-southeast-2", NOON, NOON, True, False)]
    yield from closing_tables(Closing(NOON, None, NOON, sources))
    yield from review_table(ReviewReport("r2", [ReviewedHour(NOON, 12_345, 678, 90, 90, -1_250_000_000, "hash")], 3.0))
    line = BillingLine(
        "l",
        "adjustment",
        DAY,
        "c00017",
        "s00004",
        "USD",
        -1_250_000,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        "late events",
        "r3",
        "hash",
        7,
        1,
        "[]",
        NOON,
    )
    yield from billing_table(BillingReport("r3", [line], 1, 2.0))


def comparison() -> Iterable[RenderableType]:
    cell = Cell("impressions", 1_234_567, 1_230_000, 0.0037, False, {"duplicates": 4_000, "late": 567, "unexplained": 0})
    yield from comparison_tables(Comparison("b", 0.001, 330, True, [Line(2, DAY, "summer-sale-2026", [cell])], 0))
    spend = CampaignSpend("2026-11-28", "c00017", "s00004", "JPY", 1_234_567, 8_901, 0, 5_431_000_000, 5_000_000_000, True)
    yield from budget_tables(BudgetStatus("s", "ads-metrics", NOON, 61.0, NOON, 0.4, {0: 12}, 1, None, {}, [spend]))


REPORTS: dict[str, Callable[[], Iterable[RenderableType]]] = {
    "status": status,
    "demo": demonstration,
    "maintenance": maintenance,
    "comparison": comparison,
}


def capture(parts: Iterable[RenderableType], width: int) -> str:
    """What a terminal of that width shows, without its colours."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, highlight=False)
    for part in parts:
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "".join(f"{line.rstrip()}\n" for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines())


def words(parts: Iterable[RenderableType]) -> list[str]:
    """Every word and number of the tables' cells."""
    tables = [part for part in parts if isinstance(part, RecordTable)]
    assert tables
    cells = [str(cell) for shown in tables for column in shown.columns for cell in column.cells]
    return [word for cell in cells for word in cell.split()]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("report", REPORTS)
def test_it_looks_as_captured(report: str, width: int) -> None:
    path = CAPTURES / f"{report}.{width}.txt"
    shown = capture(REPORTS[report](), width)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(shown, "utf-8")
        pytest.fail(f"{path} is new: read it")
    assert shown == path.read_text("utf-8")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("report", REPORTS)
def test_nothing_is_cut_and_nothing_is_too_wide(report: str, width: int) -> None:
    shown = capture(REPORTS[report](), width)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    held = set(shown.split())
    # a word that is longer than the line has to be folded, and is whole once its pieces are joined
    joined = "".join(shown.split())
    assert [word for word in words(REPORTS[report]()) if word not in held and (len(word) < width - 8 or word not in joined)] == []


def test_a_pipe_gets_whole_lines_whatever_their_length(capsys: pytest.CaptureFixture[str]) -> None:
    from orchestration.cli.output import console

    for part in status():
        console().print(part)
    header = next(line for line in capsys.readouterr().out.splitlines() if "offered" in line)
    assert "last ingested" in header


@given(
    st.lists(
        st.tuples(st.text("abc -", min_size=1, max_size=30), st.integers(0, 10**20), st.integers(0, 10**9)), min_size=1, max_size=4
    ),
    st.integers(44, 130),
)
def test_numbers_are_whole_at_any_width(rows: list[tuple[str, int, int]], width: int) -> None:
    shown = RecordTable("T", "name", "a number", "other", left=1)
    for name, *numbers in rows:
        shown.add_row(name, *(f"{number:,}" for number in numbers))
    printed = capture([shown], width)
    assert max(map(len, printed.splitlines())) <= width
    for _, *numbers in rows:
        for number in numbers:
            assert re.search(rf"(?<![\d,]){number:,}(?![\d,])", printed), printed


def test_neighbouring_versions_are_one_range() -> None:
    assert runs([3, 4, 5, 9, 11, 12]) == "3-5, 9, 11-12"
    assert runs([7]) == "7"
    assert runs([]) == ""


def test_a_narrow_table_is_a_block_a_row_with_its_key_first() -> None:
    shown = RecordTable("T", "stream", "region", "offered", "accepted", left=2)
    shown.add_row("events", "eu-west", "1,234", "1,000")
    lines = ["T", " stream events", " region eu-west", "   offered 1,234", "   accepted 1,000", "", ""]
    assert capture([shown], 24).split("\n") == lines


def test_the_captures_are_those_of_the_reports() -> None:
    named = {Path(path.name).with_suffix("").stem for path in CAPTURES.glob("*.txt")}
    assert named == set(REPORTS)
