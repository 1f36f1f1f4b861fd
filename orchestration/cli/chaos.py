"""The command ``adtally chaos``: random histories of real programs and faults, held to a model; failing ones are shrunk."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestration.cli.options import Json, Panel, examples
from orchestration.cli.output import console, print_json, say
from spark_jobs.errors import UsageError
from spark_jobs.texts import counted, duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from services.simulator.chaos.history import History
    from services.simulator.chaos.run import Failure, Result, Runner, Shrunk
    from services.simulator.chaos.world import StoreAddress

app = typer.Typer()


@app.command(
    rich_help_panel=Panel.TRY,
    epilog=examples(
        "adtally chaos --seed 1 --steps 30",
        "adtally chaos --seed 1 --histories 20             seeds 1 to 20",
        "adtally chaos --seed 1 --store                    with the lakehouse in an object store",
        "adtally chaos --replay chaos-1.json --keep        a failing history again, and keep its home",
    ),
)
def chaos(
    seed: Annotated[int, typer.Option(min=0, help="The seed of the first history; the next ones have the next seeds.")] = 1,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps of a history.")] = 30,
    histories: Annotated[int, typer.Option(min=1, help="How many histories to run.")] = 1,
    store: Annotated[
        bool, typer.Option("--store", help="Start an object store, keep the lakehouses in it, and lose machines.")
    ] = False,
    replay: Annotated[Path | None, typer.Option(help="Run the history of this file instead.", dir_okay=False)] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the homes, to look into them.")] = False,
    shrink: Annotated[int, typer.Option(min=0, help="How many shorter histories to try for one that fails.")] = 30,
    out: Annotated[Path, typer.Option(help="Folder for the files of failing histories.", file_okay=False)] = Path(),
    as_json: Json = False,
) -> None:
    """Run the real commands on a small home through random histories of traffic and faults, and check every total after each step.

    Commands are killed, two run at once, the power is cut, the disk is full, files are damaged, checkpoints are lost. A model in
    plain Python knows what must be true. Of a history that fails, the shortest one that still fails is written to a file and
    shown with the command that replays it. Exit status 1 if one fails. docs/chaos.md explains it.
    """
    from services.simulator.chaos.history import read_history
    from services.simulator.chaos.run import Runner
    from services.simulator.chaos.steps import draw_history

    if replay is not None:
        replayed = read_history(replay)
        drawn, histories, store = iter([replayed]), 1, replayed.in_store
    else:
        drawn = (draw_history(seed + number, steps, in_store=store) for number in range(histories))
    results: list[Result] = []
    failures: list[tuple[Failure, Shrunk | None, Path | None]] = []
    folder = Path(tempfile.mkdtemp(prefix="adtally-chaos-"))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a disk that is mounted has to be taken away
    try:
        with _bar(histories) as (bar, task), _store(folder, wanted=store) as address, Runner(folder, store=address) as runner:
            if runner.no_disk is not None and not store:
                say(f"adtally: power cuts and full disks are skipped: {runner.no_disk}", stderr=True)
            for history in drawn:
                result = _run(runner, history, bar, task, keep=keep)
                results.append(result)
                if result.failure is not None:
                    failures.append(_shrunk(runner, result, bar, task, tries=shrink, out=out if replay is None else None))
                bar.advance(task)
    finally:
        signal.signal(signal.SIGTERM, before)
        if keep:
            say(f"adtally: the homes are in {folder}", stderr=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print_json(_summary(results, failures))
    else:
        for failure, shrunk, path in failures:
            _show(failure, shrunk, path or replay)
        done = _summary(results, failures)
        say(
            f"{counted(done['histories'], 'history')}, {counted(done['steps'], 'step')}, "
            f"{counted(done['commands'], 'command')} in {duration(done['seconds'])}, {done['cpu_seconds']:.0f} s of CPU: "
            f"{done['failed']} failed"
        )
        if done["struck"]:
            say(f"faults that struck: {', '.join(f'{name} {count:,}' for name, count in done['struck'].items())}")
    if failures:
        raise typer.Exit(1)


@contextmanager
def _store(folder: Path, *, wanted: bool) -> Iterator[StoreAddress | None]:
    """Run an object store within the context, if one is wanted."""
    if not wanted:
        yield None
        return
    from services.launcher.s3 import BUCKET
    from services.launcher.trial import throwaway_s3
    from services.simulator.chaos.world import StoreAddress

    with throwaway_s3(parent=folder) as store:
        yield StoreAddress(f"s3://{BUCKET}", store.environment())


def _run(runner: Runner, history: History, bar: Progress, task: TaskID, *, keep: bool) -> Result:
    total = len(history.steps)
    return runner.run(
        history,
        lambda number, text: bar.update(task, description=f"seed {history.seed}, step {min(number + 1, total)} of {total}: {text}"),
        keep=keep,
    )


def _shrunk(
    runner: Runner, result: Result, bar: Progress, task: TaskID, *, tries: int, out: Path | None
) -> tuple[Failure, Shrunk | None, Path | None]:
    """Shrink a history that failed, and write it to ``out``. One that was replayed is as short as it is."""
    assert result.failure is not None
    if out is None:
        return result.failure, None, None
    shrunk = runner.shrink(
        result,
        tries=tries,
        watch=lambda done, left: bar.update(task, description=f"seed {result.history.seed}, shrinking {done}: {left} steps"),
    )
    path = out / f"chaos-{result.history.seed}.json"
    try:
        shrunk.history.write(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", hint="name another folder with --out") from None
    return shrunk.failure, shrunk, path


def _show(failure: Failure, shrunk: Shrunk | None, path: Path | None) -> None:
    say(f"failed: {failure.message}")
    if shrunk is not None:
        say(f"the shortest history that fails, of {counted(shrunk.tries, 'try')}:")
        for number, step in enumerate(shrunk.history.steps, start=1):
            say(f"  {number}. {step}")
        if failure.step == len(shrunk.history.steps):
            say("  then the checks at the end")
    say(f"run it again: adtally chaos --replay {path}")


def _summary(results: list[Result], failures: list[tuple[Failure, Shrunk | None, Path | None]]) -> dict[str, Any]:
    return {
        "histories": len(results),
        "steps": sum(len(result.history.steps) if result.failure is None else result.failure.step for result in results),
        "commands": sum(result.commands for result in results),
        "seconds": sum(result.seconds for result in results),
        "cpu_seconds": sum(result.cpu_seconds for result in results),
        "struck": dict(sorted(sum((result.struck for result in results), Counter[str]()).items())),
        "skipped": sorted(set().union(*(result.skipped for result in results))),
        "failed": len(failures),
        "failures": [
            {
                "failure": asdict(failure),
                "history": None if shrunk is None else asdict(shrunk.history),
                "file": None if path is None else str(path),
            }
            for failure, shrunk, path in failures
        ],
    }


@contextmanager
def _bar(histories: int, shown: Console | None = None) -> Iterator[tuple[Progress, TaskID]]:
    """Show on standard error how many histories are done and what the present one does, cut to the width of the terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    shown = shown or console(stderr=True)
    text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1), markup=False)
    columns = (BarColumn(bar_width=12), MofNCompleteColumn(), text)
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal, expand=True) as bar:
        yield bar, bar.add_task("starting", total=histories)
