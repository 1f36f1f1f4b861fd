"""Runs histories, and shrinks one that fails to the shortest that still fails."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from services.simulator.chaos.checks import Violation, check_marts, require
from services.simulator.chaos.history import History, Step
from services.simulator.chaos.power import LoopDisk, why_not
from services.simulator.chaos.programs import Programs
from services.simulator.chaos.steps import STEPS
from services.simulator.chaos.world import DISK_MEGABYTES, StoreAddress, World

CLOSED_BY_HAND = datetime(2026, 1, 1, tzinfo=UTC)  # after all traffic but that of clocks that lie
END = "the end"
Watch = Callable[[int, str], None]
"""Called with the number of a step, from 0, and its text, before it runs."""


@dataclass(frozen=True)
class Failure:
    """What failed: the invariant, the number of the step, and what was found."""

    invariant: str
    step: int
    message: str


@dataclass
class Result:
    """How a history ended."""

    history: History
    failure: Failure | None
    seconds: float
    cpu_seconds: float
    commands: int
    skipped: set[str] = field(default_factory=set)
    struck: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Shrunk:
    """The shortest history that was found to fail, and how many were tried."""

    history: History
    failure: Failure
    tries: int


class Runner:
    """Runs histories in folders of their own below ``folder``. Use as a context manager.

    ``disturb`` is called before the invariants of each step: tests plant faults with it. ``store``: where histories may have
    their lakehouses.
    """

    def __init__(
        self, folder: Path, disturb: Callable[[World, Step], None] | None = None, *, store: StoreAddress | None = None
    ) -> None:
        self._folder = folder
        self._disturb = disturb
        self._number = 0
        self._store = store
        self._programs = Programs(folder / "programs", store.variables if store else {})
        self.no_disk: str | None = None

    def __enter__(self) -> Runner:
        self._folder.mkdir(parents=True, exist_ok=True)
        self.no_disk = why_not(self._folder / "try")
        self._programs.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._programs.__exit__()

    def run(self, history: History, watch: Watch = lambda _number, _text: None, *, keep: bool = False) -> Result:
        """Run a history to its end, or to the first violation. Without ``keep`` delete its folder."""
        self._number += 1
        folder = self._folder / f"history-{self._number}"
        started, cpu, commands = time.monotonic(), self._programs.cpu_seconds, self._programs.commands
        number, failure = 0, None
        with self._disk(folder, history) as disk:
            assert self._store is not None or not history.in_store
            world = World(history, folder, self._programs, disk, self._store if history.in_store else None)
            try:
                for number, step in enumerate(history.steps):
                    watch(number, str(step))
                    STEPS[step.name].run(world, step.arguments)
                    if self._disturb is not None:
                        self._disturb(world, step)
                    world.check()
                number = len(history.steps)
                watch(number, END)
                end(world, builds_marts=history.builds_marts)
            except Violation as violation:
                failure = Failure(violation.invariant, number, str(violation))
            if keep and disk is not None:
                shutil.copytree(world.home, folder / "home")
        if not keep:
            shutil.rmtree(folder)
        spent = self._programs.cpu_seconds - cpu
        seconds = time.monotonic() - started
        return Result(history, failure, seconds, spent, self._programs.commands - commands, world.skipped, world.struck)

    @contextlib.contextmanager
    def _disk(self, folder: Path, history: History) -> Iterator[LoopDisk | None]:
        folder.mkdir(parents=True)
        needs = any(step.name in ("power cut", "full disk") for step in history.steps)
        if not needs or self.no_disk is not None:
            yield None
            return
        with LoopDisk(folder, DISK_MEGABYTES) as disk:
            yield disk

    def shrink(self, failed: Result, *, tries: int, watch: Callable[[int, int], None] = lambda _tries, _steps: None) -> Shrunk:
        """Leave out steps for as long as the same invariant fails (delta debugging), at most ``tries`` runs.

        ``watch`` is called with the number of runs and of steps that are left.
        """
        failure = failed.failure
        assert failure is not None
        best = failed.history.with_steps(failed.history.steps[: failure.step + 1])
        done, parts = 0, 2
        while done < tries and len(best.steps) > 1:
            size = max(1, -(-len(best.steps) // parts))
            for start in range(0, len(best.steps), size):
                shorter = best.with_steps(best.steps[:start] + best.steps[start + size :])
                if not shorter.steps or done >= tries:
                    continue
                done += 1
                watch(done, len(best.steps))
                again = self.run(shorter).failure
                if again is not None and again.invariant == failure.invariant:
                    best, failure, parts = shorter.with_steps(shorter.steps[: again.step + 1]), again, max(parts - 1, 2)
                    break
            else:
                if size == 1:
                    break
                parts = min(2 * parts, len(best.steps))
        return Shrunk(best, failure, done)


def end(world: World, *, builds_marts: bool) -> None:
    """Bring a home to its end, and check the totals in every store. Raises Violation."""
    model = world.model
    world.run("ingest")
    model.end_ingest()
    if model.needs_repair or model.is_correcting or model.marts_differ:
        world.run("reconcile", "--repair")
        model.needs_repair = model.is_correcting = model.marts_differ = False
    model.is_corrected = True
    closed = world.closed_through()
    if closed is None or closed < CLOSED_BY_HAND:
        world.run("hours", "close", "--through", f"{CLOSED_BY_HAND:%Y-%m-%dT%H:%M:%SZ}", "--reason", "the history has ended")
    for command in ("review", "attribute", "bill"):
        world.run(command)
    model.reviewed()
    closed = world.closed_through()
    require(closed is not None, "hours close", "no hour is closed at the end")
    assert closed is not None
    world.check_settled(closed)
    for command in ("compact", "reconcile", "fsck", "status"):
        world.run(command)
    world.check_settled(closed)
    if builds_marts:
        world.run("marts", "build")
        check_marts(world.home / "marts" / "marts.duckdb", model.books(), offered=model.counts_offered)
    again = world.run("ingest", "--json")
    if '"offered": 0' not in again.said:
        raise Violation("second run", f"an ingest read something again: {again.said[-1500:]}")
