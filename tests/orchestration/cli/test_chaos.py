"""``adtally chaos`` as a person sees it: a bar that fits the terminal, and files that are no history."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from orchestration.cli.app import run
from orchestration.cli.chaos import _bar


def test_the_bar_fits_a_terminal_of_80_columns() -> None:
    printed = io.StringIO()
    shown = Console(file=printed, width=80, force_terminal=True, color_system=None)
    with _bar(20, shown) as (bar, task):
        bar.update(task, description=f"seed 3, step 2 of 30: at once (commands {['reconcile --repair'] * 9}, [/x])", refresh=True)
        (line,) = shown.render_lines(bar.get_renderable(), pad=False)
    text = "".join(segment.text for segment in line)
    assert len(text.rstrip()) <= 80 and "0/20" in text and "seed 3, step 2 of 30: at once" in text and "…" in text


def test_a_file_that_is_no_history_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    assert run(["chaos", "--replay", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert error == f"adtally: error: {tmp_path / 'x.json'} is no history (name a file that adtally chaos wrote)\n"
    assert run(["chaos", "--replay", str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read: No such file" in capsys.readouterr().err
