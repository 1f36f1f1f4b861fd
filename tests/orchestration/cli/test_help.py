"""The help of every command, and that the commands written down for people (help, README, docs) can be typed as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
import typer

from orchestration.cli import app as module
from orchestration.cli import completion
from orchestration.cli.app import app, run
from orchestration.cli.options import Panel

ROOT = Path(__file__).resolve().parents[3]
# not a word of ours: what follows a pipe, a redirection, or two spaces and a remark
_END = re.compile(r"\s*(?:\|\|?|&&|>|2>|#|\s\s)")


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group with its path."""
    command = command or typer.main.get_command(app)
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


PATHS = [path for path, _ in commands()]


def unescaped(epilog: str) -> list[str]:
    return [line.replace("\\[", "[") for line in epilog.split("\n\n")]


def invocations(text: str) -> list[list[str]]:
    """The arguments of each ``adtally`` of a command line, up to what belongs to the shell or to the reader."""
    found = []
    for part in re.split(r"(?<![\w./-])adtally(?= |$)", text)[1:]:
        quoted, end = "", 0
        while end < len(part):  # a quoted text may hold anything
            if quoted:
                quoted = "" if part[end] == quoted else quoted
            elif part[end] in "'\"":
                quoted = part[end]
            elif _END.match(part, end):
                break
            end += 1
        found.append(shlex.split(part[:end]))
    return found


def parse(arguments: list[str]) -> tuple[str, ...]:
    """The path of the command that these arguments call, with every option and value judged; nothing is run."""
    called: list[tuple[str, ...]] = []
    root = typer.main.get_command(app)
    for path, command in commands(root):
        if not hasattr(command, "commands"):
            command.callback = lambda _path=path, **_: called.append(_path)
    status = root.main(args=arguments, prog_name="adtally", standalone_mode=False)
    assert not status, f"adtally {shlex.join(arguments)}: exit status {status}"
    assert called, f"adtally {shlex.join(arguments)} calls no command"
    return called[0]


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_every_command_has_help_with_examples(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*path, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"Usage: {' '.join(('adtally', *path))} " in out
    assert "Examples:" in out
    command = dict(commands())[path]
    assert (command.help or "").strip()
    for parameter in command.params:
        if type(parameter).__name__ != "TyperArgument" and parameter.name not in ("install_completion", "show_completion"):
            assert parameter.help, f"{parameter.name} has no help"


def examples() -> list[tuple[tuple[str, ...], str]]:
    return [
        (path, line)
        for path, command in commands()
        for line in unescaped(command.epilog or "")
        if "adtally" in line and line != "Examples:" and not line.startswith("Everything")
    ]


def test_every_command_has_an_example_of_itself() -> None:
    shown = {path: [line for owner, line in examples() if owner == path] for path in PATHS}
    for path, lines in shown.items():
        assert lines, path
        for line in lines:
            wanted = " ".join(("adtally", *path))
            assert wanted in line or "--home" in line, f"{path}: {line}"


@pytest.mark.parametrize(("path", "line"), examples(), ids=lambda value: value if isinstance(value, str) else " ")
def test_examples_can_be_typed(path: tuple[str, ...], line: str) -> None:
    found = invocations(line)
    assert found
    called = [parse(arguments) for arguments in found]
    if path:
        assert any(one[: len(path)] == path for one in called), line


def written() -> list[str]:
    """Command lines of the README and the docs: indented, or in back-quotes."""
    lines = []
    for file in [ROOT / "README.md", ROOT / "samples" / "README.md", ROOT / "benchmarks" / "README.md", *ROOT.glob("docs/**/*.md")]:
        text = file.read_text("utf-8")
        lines += re.findall(r"^ {4}((?:\w+=\S+ )?adtally .*)$", text, re.MULTILINE)
        lines += [" ".join(found.split()) for found in re.findall(r"`((?:\w+=\S+ )?adtally [^`]+)`", text)]
    return sorted(set(lines))


def test_the_help_groups_every_command_by_what_a_person_wants() -> None:
    grouped = {name: command.rich_help_panel for name, command in typer.main.get_command(app).commands.items()}  # type: ignore[attr-defined]
    assert len(grouped) > 25
    assert {name for name, panel in grouped.items() if panel not in set(Panel)} == set()
    assert set(grouped.values()) == set(Panel)


def test_a_shell_completes_campaigns_and_named_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = typer.Context(typer.main.get_command(app))
    context.params["home"] = str(tmp_path)
    assert completion.campaigns(context, "c0") == []
    (tmp_path / "marts").mkdir()
    with duckdb.connect(str(tmp_path / "marts" / "marts.duckdb")) as marts:
        marts.execute("create table fct_campaign_day as select unnest(['c02', 'c01', 'c01', 'x%']) as campaign_id")
    assert completion.campaigns(context, "c0") == ["c01", "c02"]
    assert completion.campaigns(context, "%") == []
    assert ("budget_pacing" in dict(completion.named_queries("bud"))) and not completion.named_queries("no such")
    heavy = {"duckdb", "pyarrow", "dagster", "pyspark", "pandas", "pydantic", "numpy"}
    code = f"import sys, orchestration.cli.app; print(sorted({heavy!r} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_readme_names_commands() -> None:
    assert "adtally marts build                  a new file, tested, then swapped in" in written()


@pytest.mark.parametrize("line", written())
def test_what_the_docs_say_can_be_typed(line: str) -> None:
    for arguments in invocations(line):
        assert parse(arguments)


def test_this_test_sees_wrong_examples() -> None:
    line = "ADTALLY_HOME=x adtally query 'a | b  c' --format csv | adtally status --json  # for a program"
    assert invocations(line) == [["query", "a | b  c", "--format", "csv"], ["status", "--json"]]
    for wrong in (["simulat"], ["explain"], ["status", "--jsn"], ["simulate", "--out", "x", "--events", "many"], ["marts"]):
        with pytest.raises(module._ClickException):
            parse(wrong)
