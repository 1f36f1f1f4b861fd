"""Nothing that data holds steers a terminal, a spreadsheet or the pages that show it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from rich.console import RenderableType

from orchestration.cli import output
from orchestration.cli.app import run
from orchestration.cli.compare import comparison_tables
from orchestration.cli.status import status_tables
from orchestration.compare.comparison import Cell, Comparison, Line
from orchestration.explain.node import Node, as_tree
from orchestration.marts.render import render
from spark_jobs.operate.status import QuarantinedFile, SourceStatus, Status

ROOT = Path(__file__).parents[3]
EVIL = "\x1b[31mred \x1b]8;;http://evil.example\x07link\x9b2J \u202eab\r[red]x[/red] [/] :smile:"
SHOWN = r"\x1b[31mred \x1b]8;;http://evil.example\x07link\x9b2J \u202eab\r[red]x[/red] [/] :smile:"


def explained() -> Iterable[RenderableType]:
    return [as_tree(Node(EVIL, {"fact": EVIL, "list": [EVIL]}, [Node(EVIL, {"in": EVIL}, problems=[EVIL])], [EVIL]))]


def compared() -> Iterable[RenderableType]:
    cell = Cell("clicks", 2, 1, 0.5, False, {EVIL: 1})
    return comparison_tables(Comparison("build", 0.1, 0, True, [Line(2, date(2026, 3, 10), EVIL, [cell])], 0))


def stated() -> Iterable[RenderableType]:
    source = SourceStatus("events", "files", EVIL, 1, 1, 0, 0, 0, 0, None, 0, None)
    file = QuarantinedFile(EVIL, [EVIL], datetime(2026, 3, 10, tzinfo=UTC))
    return status_tables(Status(sources=[source], quarantined_files=[file], problems=[EVIL]))


@pytest.mark.parametrize("shown", [explained, compared, stated, lambda: [EVIL]])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_shows_what_the_data_say(shown: object, is_terminal: bool) -> None:
    console = output.CleanConsole(
        file=io.StringIO(), width=1000, markup=False, emoji=False, highlight=False, force_terminal=is_terminal, color_system=None
    )
    for part in shown():  # type: ignore[operator]
        console.print(part, soft_wrap=True)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert SHOWN in said or SHOWN.replace(r"\x07", "").replace(r"\r", "") in said  # these two rich leaves out of its own texts
    assert all(character.isprintable() or character == "\n" for character in said)


def test_the_console_of_the_commands_is_that_one(capsys: pytest.CaptureFixture[str]) -> None:
    output.console().print(EVIL, soft_wrap=True)
    output.print_json({"a": EVIL})
    said = capsys.readouterr().out
    assert said.startswith(SHOWN + "\n")
    assert json.loads(said.partition("\n")[2]) == {"a": EVIL}
    assert all(character.isprintable() or character == "\n" for character in said)
    used = [path for path in (ROOT / "orchestration").rglob("*.py") if path.name != "output.py"]
    assert not [path for path in used if "rich.markup" in path.read_text("utf-8") or " Console(" in path.read_text("utf-8")]


def test_what_a_command_writes_is_its_users_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = [sys.executable, "-m", "orchestration.cli", "--home", str(home), "simulate", "--events", "100"]
    subprocess.run([*command, "--out", str(home / "landing")], check=True, cwd=ROOT, umask=0o022, capture_output=True)
    written = [home, *home.rglob("*")]
    assert len(written) > 5
    assert [path for path in written if path.stat().st_mode & 0o077] == []


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["query", "--named", EVIL]) == 2
    said = capsys.readouterr().err
    assert r"\x1b]8;;http://evil.example\x07" in said and "\x1b" not in said


FORMULAS = ["=cmd|' /C calc'!A0", "+A1", "-1+1", "-1\n=1", "@SUM(A1)", "\t=1", " \t=1", "\r=1", "＝1", "\n=1"]


def test_csv_is_no_formula_and_json_is_whole() -> None:
    rows = [[text, -1, None] for text in [*FORMULAS, "a=b", "-12.5", EVIL]]
    lines = render(["=a", "n", "gap"], rows, "csv").splitlines()
    assert lines[0] == "'=a,n,gap"
    assert [line[:2].lstrip('"')[0] for line in lines[1:] if line.startswith(("\"'", "'"))] == ["'"] * len(FORMULAS)
    assert "a=b,-1," in lines and "-12.5,-1," in lines and f"{SHOWN},-1," in lines
    assert render(["a"], [["=1"], [EVIL]], "csv", is_raw=True).splitlines()[:2] == ["a", "=1"]
    assert EVIL in render(["a"], [[EVIL]], "csv", is_raw=True)
    assert json.loads(render(["a"], [[EVIL]], "json")) == [{"a": EVIL}]
    for form in ("table", "csv", "json"):
        assert "\x1b" not in render([EVIL], [[EVIL]], form) and "\x9b" not in render([EVIL], [[EVIL]], form)


def test_markdown_of_dagster_shows_no_image() -> None:
    from orchestration.assets.hours import markdown_table

    [header, _, row] = str(markdown_table([{"cam|paign": "![x](http://evil.example/a.png)<img src=x>\n| `b`"}]).md_str).splitlines()
    assert header == r"| cam\|paign |"
    assert row == r"| \!\[x\]\(http\:\/\/evil\.example\/a\.png\)\<img src\=x\>\\n\| \`b\` |"
