"""The documentation: links, files, settings and commands in it exist, and each runbook has a test that follows its steps."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from orchestration.cli.app import app
from spark_jobs.config import Settings
from spark_jobs.lake.locks import LOCKS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "samples").glob("*.md")]
)
RUNBOOKS = ROOT / "docs" / "runbooks"
CURRENT_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""The changelog also describes older versions."""


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


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_that_are_shown_exist(page: Path) -> None:
    assert [(words, unknown) for words in _commands(page) if (unknown := _unknown(words))] == []


def _module_calls() -> list[tuple[str, ...]]:
    """Each ``python -m`` of the pages: the module and its arguments."""
    calls = set()
    for page in CURRENT_PAGES:
        for line in re.findall(r"python -m ([^`|)\n]+)", page.read_text("utf-8")):
            calls.add(tuple(shlex.split(re.split(r" {2,}|[,;:] ", line)[0])))
    return sorted(calls)


class _ParsedError(Exception):
    """Raised in place of running a program whose arguments are valid."""


@pytest.mark.parametrize("call", _module_calls(), ids=" ".join)
def test_programs_that_are_shown_accept_their_arguments(call: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    name, arguments = call[0], list(call[1:])
    module = import_module(name)
    if hasattr(module, "__path__"):  # a package, which runs its __main__
        module = import_module(f"{name}.__main__")
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, args: list[str] | None = None) -> None:
        parse(self, args)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(_ParsedError):
        module.main()
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_targets_files_and_settings_that_are_named_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
    wrong = set(re.findall(r"(?:`|^ {4})make ([a-z0-9-]+)", text, flags=re.MULTILINE)) - set(targets)
    wrong |= {name for name in re.findall(r"`([\w.*<>-]+/[\w./*<>-]*)(?:`|::)", text) if not _exists(name)}
    wrong |= set(_SETTING.findall(text)) - _settings()
    assert wrong == set()


_SETTING = re.compile(r"\bADTALLY_[A-Z_]*[A-Z]\b")


def _exists(name: str) -> bool:
    """Whether a file or folder of the repository exists. True for names of other places, such as ADTALLY_HOME.

    A Python file outside the folders of the repository is one below spark_jobs/.
    """
    pattern = re.sub(r"<\w+>", "*", name).rstrip("/")
    if "/.work" in pattern:  # made by the benchmarks
        return True
    if (ROOT / pattern.split("/")[0]).is_dir():
        return any(ROOT.glob(pattern))
    return not name.endswith(".py") or any((ROOT / "spark_jobs").glob(pattern))


@cache
def _settings() -> set[str]:
    """The environment variables that adtally reads. ADTALLY_NAME is an example's."""
    sources = [path for package in ("orchestration", "spark_jobs", "services") for path in (ROOT / package).rglob("*.py")]
    read = {name for path in sources for name in _SETTING.findall(path.read_text("utf-8"))}
    return {f"ADTALLY_{name.upper()}" for name in Settings.model_fields} | read | {"ADTALLY_NAME"}


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


def test_each_test_that_a_page_names_exists() -> None:
    named = {name for page in CURRENT_PAGES for name in re.findall(r"`(tests/[\w/]+\.py::\w+)`", page.read_text("utf-8"))}
    assert len(named) > 20
    lacking = {name for name in named if f"\ndef {name.split('::')[1]}(" not in (ROOT / name.split("::")[0]).read_text("utf-8")}
    assert lacking == set()
