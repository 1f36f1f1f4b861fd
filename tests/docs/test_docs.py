"""The documentation: links lead somewhere, commands exist, and each runbook has a test that walks it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from orchestration.cli.app import app
from spark_jobs.lake.locks import LOCKS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "samples").glob("*.md")]
)
RUNBOOKS = ROOT / "docs" / "runbooks"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
    local = [link.split("#")[0] for link in links if "://" not in link and not link.startswith(("#", "mailto:"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


def _commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of ours that a page shows, without comments and without what follows a pipe or a semicolon."""
    text = page.read_text("utf-8")
    shown = re.findall(r"^ {3,}(adtally .*)$", text, flags=re.MULTILINE) + re.findall(r"`(adtally [^`]+)`", text)
    for line in shown:
        line = re.split(r" {3,}| # ", " ".join(line.split()) if line.startswith("`") else line)[0]
        try:
            words = shlex.split(line)
        except ValueError:  # a quote that the next line ends
            words = line.split()
        ends = [at for at, word in enumerate(words) if word in ("|", "&", "&&", ";") or word.endswith((";", "…"))]
        yield words[1 : min(ends, default=len(words))]


def _unknown(words: list[str]) -> str | None:
    """What of a command does not exist; None where all of it does."""
    command = get_command(app)
    while words:
        if words[0].startswith("-") and words[0] != "-":
            name, _, value = words[0].partition("=")
            option = next((each for each in command.params if name in (*each.opts, *each.secondary_opts)), None)
            if option is None and name != "--help":
                return name
            takes_next = option is not None and not value and not getattr(option, "is_flag", False)
            words = words[2 if takes_next else 1 :]
        elif isinstance(command, TyperGroup):
            found = command.commands.get(words[0])
            if found is not None:
                command = found
            elif words[0].isalpha() and words[0].islower():
                return words[0]
            words = words[1:]
        else:
            words = words[1:]
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_that_are_shown_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # it tells of older versions too
        pytest.skip("tells of older versions too")
    assert [(words, unknown) for words in _commands(page) if (unknown := _unknown(words))] == []


def test_each_runbook_is_walked_by_a_test() -> None:
    rows = re.findall(
        r"^\| \[[^\]]+\]\(([^)]+)\) \| `([^`]+)::(\w+)` \|$", (RUNBOOKS / "README.md").read_text("utf-8"), flags=re.MULTILINE
    )
    assert sorted(page for page, _, _ in rows) == sorted(path.name for path in RUNBOOKS.glob("*.md") if path.name != "README.md")
    missing = [
        f"{file}::{test}"
        for _, file, test in rows
        if not (ROOT / file).exists() or f"def {test}(" not in (ROOT / file).read_text("utf-8")
    ]
    assert missing == []


def test_the_table_of_locks_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = [line for line in text.split("## Locks\n")[1].splitlines() if line.startswith("| `")]
    assert rows == [f"| `{lock.file}` | {lock.holder} | {lock.patience} |" for lock in LOCKS]
