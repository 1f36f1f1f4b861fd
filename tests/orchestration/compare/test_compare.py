"""Reports that count otherwise than we do, each by hand: what is found to explain them."""

from __future__ import annotations

import json
from datetime import date, timedelta
from pathlib import Path

import pytest

from orchestration.cli import app
from orchestration.compare import Comparison, compare_report, read_report
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, UsageError
from tests.orchestration.compare.small_home import Some, days_cut_at, make_home

# 2026-03-10, c1: 43 billable impressions (3 of them late) and 10 clicks; 5 impressions and 3 clicks invalid (one click late).
# Sent again: 4 of the billable impressions, 1 of the invalid clicks. 2026-03-11: 1 impression.
TRAFFIC = [
    Some(40, "impression", "2026-03-10T10:00", again=4),
    Some(10, "click", "2026-03-10T10:30"),
    Some(5, "impression", "2026-03-10T11:00", rule="repeat_impression"),
    Some(2, "click", "2026-03-10T11:00", rule="crawler_user_agent", again=1),
    Some(3, "impression", "2026-03-10T12:00", is_late=True),
    Some(1, "click", "2026-03-10T12:00", rule="click_rate", is_late=True),
    Some(1, "impression", "2026-03-11T12:00"),
    Some(9, "impression", "2026-03-10T12:00", "another"),
]

# Days whose busy times lie near midnight, so that each offset gives other numbers.
BY_NIGHT = [
    Some(10 * day + part, "impression", f"2026-03-{day:02d}T{hour}", "night")
    for day in (9, 10, 11)
    for part, hour in enumerate(("00:10", "05:50", "11:40", "18:20", "23:15", "23:45"))
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return make_home(tmp_path_factory.mktemp("compared"), [*TRAFFIC, *BY_NIGHT])


def compared(home: Settings, folder: Path, *lines: str, tolerance: float = 0.1) -> Comparison:
    path = folder / "report.csv"
    path.write_text("\n".join(["date,campaign,impressions,clicks", *lines]) + "\n")
    return compare_report(home, path, tolerance=tolerance)


def causes(found: Comparison, line: int = 0) -> tuple[dict[str, int], dict[str, int]]:
    shown, clicked = found.lines[line].cells
    for cell in (shown, clicked):
        assert sum(cell.causes.values()) == cell.ours - cell.theirs
    return shown.causes, clicked.causes


@pytest.mark.parametrize(
    ("what", "shown", "clicked", "expected"),
    [
        ("the same", 43, 10, ({}, {})),
        ("gross", 48, 13, ({"invalid": -5}, {"invalid": -3})),
        ("no late ones", 40, 10, ({"late": 3}, {})),
        ("duplicates", 47, 10, ({"duplicates": -4}, {})),
        ("gross without late", 45, 12, ({"invalid": -5, "late": 3}, {"invalid": -3, "late": 1})),
        ("gross with duplicates", 52, 14, ({"duplicates": -4, "invalid": -5}, {"duplicates": -1, "invalid": -3})),
        ("gross and two more", 50, 13, ({"invalid": -5, "unexplained": -2}, {"invalid": -3})),
        ("half of it", 21, 10, ({"unexplained": 22}, {})),
    ],
)
def test_a_cause_is_found(
    home: Settings, tmp_path: Path, what: str, shown: int, clicked: int, expected: tuple[dict[str, int], dict[str, int]]
) -> None:
    found = compared(home, tmp_path, f"2026-03-10,c1,{shown},{clicked}")
    assert causes(found) == expected, what
    assert found.utc_offset_minutes == 0 and found.campaigns_not_named == 2


@pytest.mark.parametrize("minutes", [0, 30, -30, 330, -300, 60, 840, -720])
def test_days_cut_at_another_offset(home: Settings, tmp_path: Path, minutes: int) -> None:
    theirs = days_cut_at(BY_NIGHT, timedelta(minutes=minutes))
    found = compared(home, tmp_path, *(f"{day},night,{shown},{clicked}" for day, shown, clicked in theirs))
    assert found.utc_offset_minutes == minutes or days_cut_at(BY_NIGHT, timedelta(minutes=found.utc_offset_minutes)) == theirs
    for number, (day, shown, _clicked) in enumerate(theirs):
        ours = sum(some.count for some in BY_NIGHT if some.at.startswith(day))
        assert causes(found, number) == ({"time_zone": ours - shown} if ours != shown else {}, {})


def test_noise_is_no_time_zone(home: Settings, tmp_path: Path) -> None:
    """Some offset always fits a little better; it takes one that explains more than half."""
    at_utc = days_cut_at(BY_NIGHT, timedelta())
    noise = [9, -8, 11]
    lines = [f"{day},night,{shown + more},{clicked}" for (day, shown, clicked), more in zip(at_utc, noise, strict=True)]
    found = compared(home, tmp_path, *lines)
    assert found.utc_offset_minutes == 0
    assert [causes(found, number)[0] for number in range(3)] == [{"unexplained": -more} for more in noise]


def test_what_is_missing_here_or_there(home: Settings, tmp_path: Path) -> None:
    found = compared(home, tmp_path, "2026-03-10,c1,43,10", "2026-03-12,c1,7,1", "2026-03-10,unknown,5,0")
    assert [(line.date.isoformat(), line.campaign, line.line) for line in found.lines] == [
        ("2026-03-10", "c1", 2),
        ("2026-03-12", "c1", 3),
        ("2026-03-10", "unknown", 4),
        ("2026-03-11", "c1", None),
    ]
    assert [causes(found, number) for number in range(4)] == [
        ({}, {}),
        ({"missing_here": -7}, {"missing_here": -1}),
        ({"missing_here": -5}, {"missing_here": 0}),
        ({"missing_there": 1}, {"missing_there": 0}),
    ]
    assert [cell.discrepancy for line in found.lines[1:] for cell in line.cells] == [None, None, None, 0.0, 1.0, 0.0]
    assert [(line.date, line.campaign) for line in found.over] == [
        (date(2026, 3, 12), "c1"),
        (date(2026, 3, 10), "unknown"),
        (date(2026, 3, 11), "c1"),
    ]


@pytest.mark.parametrize(("shown", "is_within"), [(36, True), (35, False), (44, True), (45, False), (40, True)])
def test_the_tolerance_on_both_sides(tmp_path: Path, shown: int, is_within: bool) -> None:
    home = make_home(tmp_path / "home", [Some(40, "impression", "2026-03-10T10:00")])
    found = compared(home, tmp_path, f"2026-03-10,c1,{shown},0", tolerance=0.10)
    assert found.lines[0].cells[0].is_within is is_within
    assert found.lines[0].cells[0].discrepancy == (40 - shown) / 40


def test_duplicates_stay_unexplained_without_the_landing_files(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", TRAFFIC)
    (home.landing_path / "events" / "eu" / "one.jsonl").unlink()
    found = compared(home, tmp_path, "2026-03-10,c1,47,10")
    assert causes(found) == ({"unexplained": -4}, {}) and not found.knows_duplicates


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "line 1: there is no column date"),
        ("date,campaign,impressions\n", "line 1: there is no column clicks"),
        ("date,campaign,campaign_id,impressions,clicks\n", "line 1: there is more than one column campaign or campaign_id"),
        ("date,campaign,impressions,clicks\n", "no line below its header"),
        ("date,campaign,impressions,clicks\n2026-03-10,c1,1\n", "line 2: 3 fields where the header has 4"),
        (
            "date,campaign,impressions,clicks\n2026-03-10,c1,1,1\n10.03.2026,c1,1,1\n",
            "line 3, column date: '10.03.2026' is not a date",
        ),
        ("date,campaign,impressions,clicks\n2026-02-30,c1,1,1\n", "line 2, column date: '2026-02-30' is not a date"),
        ("date,campaign,impressions,clicks\n2026-03-10,,1,1\n", "line 2, column campaign: '' is not a campaign"),
        ("date,campaign,impressions,clicks\n2026-03-10,c1,-1,1\n", "line 2, column impressions: '-1' is not a whole number"),
        ("date,campaign,impressions,clicks\n\n2026-03-10,c1,1,1.5\n", "line 3, column clicks: '1.5' is not a whole number"),
        (
            'date,campaign,impressions,clicks\n2026-03-10,c1,"1 000",1\n',
            "line 2, column impressions: '1 000' is not a whole number",
        ),
        ('date,campaign,impressions,clicks\n2026-03-10,"c1,1,1\n', "line 2: unexpected end of data"),
        (
            "date,campaign,impressions,clicks\n2026-03-10,c1,1,1\n2026-03-10,c1,2,1\n",
            "line 3: 'c1' on 2026-03-10 is there twice",
        ),
    ],
)
def test_a_report_that_cannot_be_right(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "report.csv"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"report\.csv") as caught:
        read_report(path)
    assert said in str(caught.value)


def test_a_report_of_a_spreadsheet(tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    path.write_bytes("\ufeffClicks, Impressions ,Campaign_ID,spend,Date\r\n1,20,c1,3.50,2026-03-10\r\n\r\n".encode())
    assert [(line.line, line.date, line.campaign, line.impressions, line.clicks) for line in read_report(path)] == [
        (2, date(2026, 3, 10), "c1", 20, 1)
    ]
    (tmp_path / "latin.csv").write_bytes(b"date,campaign,impressions,clicks\n2026-03-10,caf\xe9,1,1\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_report(tmp_path / "latin.csv")
    with pytest.raises(UsageError, match="cannot be read"):
        read_report(tmp_path / "none.csv")


def test_the_command(home: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.csv"
    path.write_text("date,campaign,impressions,clicks\n2026-03-10,c1,48,13\n")
    arguments = ["--home", str(home.home_path), "compare", str(path)]
    assert app.run(arguments) == 1
    out, err = capsys.readouterr()
    assert "invalid -5" in out and "-11.63%" in out and "2 of 2 figures are over the tolerance" in out and err == ""
    assert app.run([*arguments, "--tolerance", "0.3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_within"] and found["causes"] == {"impressions_invalid": -5, "clicks_invalid": -3}
    assert found["lines"][0]["cells"][0] == {
        "measure": "impressions",
        "ours": 43,
        "theirs": 48,
        "discrepancy": pytest.approx(-5 / 43),
        "is_within": True,
        "causes": {"invalid": -5},
    }
    path.write_text("date,campaign\n")
    assert app.run(arguments) == 2
    assert "line 1: there is no column impressions" in capsys.readouterr().err


def test_without_marts(tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    path.write_text("date,campaign,impressions,clicks\n2026-03-10,c1,1,1\n")
    from spark_jobs.config import load_settings

    with pytest.raises(AdtallyError, match="no marts yet"):
        compare_report(load_settings(home=tmp_path / "home"), path, tolerance=0.1)
