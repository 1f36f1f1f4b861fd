"""Histories of real programs and faults: some of fixed seeds hold, and a planted fault is found, shrunk and found again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from deltalake import DeltaTable, write_deltalake

from orchestration.cli.app import run
from services.launcher.s3 import BUCKET
from services.simulator.chaos import steps as registry
from services.simulator.chaos.checks import require
from services.simulator.chaos.history import History, Step, read_history
from services.simulator.chaos.run import END, Runner
from services.simulator.chaos.steps import Command, draw_history
from services.simulator.chaos.world import StoreAddress, World

pytestmark = [pytest.mark.homes, pytest.mark.timeout(1800)]

SEEDS = range(100, 110)
STEPS = 6

LAND = Step("land", {"number": 1, "records": 25})
INGEST = Step("ingest", {})


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory, store: dict[str, str]) -> Iterator[Runner]:
    """One fork server, one Java and one object store for all histories of this file."""
    with Runner(tmp_path_factory.mktemp("chaos"), store=StoreAddress(f"s3://{BUCKET}", store)) as made:
        yield made


@pytest.mark.parametrize("seed", SEEDS)
def test_a_history_holds(runner: Runner, seed: int) -> None:
    result = runner.run(draw_history(seed, STEPS))
    assert result.failure is None, result.failure.message
    assert result.commands > 5


LOST = History(
    4,
    (
        *(LAND, Step("killed", {"command": "ingest", "crash_at": "after:events", "batches_ahead": 0}), Step("lose machine", {})),
        *(INGEST, Step("land", {"number": 2, "records": 25}), INGEST),
    ),
    in_store=True,
)
"""Of two machines: the first one is lost with a batch half committed."""


def test_a_lost_machine_in_a_store(runner: Runner) -> None:
    result = runner.run(LOST)
    assert result.failure is None, result.failure.message
    assert result.struck == {"kill": 1, "lost machine": 1}


def test_a_machine_that_is_lost_with_its_checkpoints_is_noticed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its successor would read everything again."""

    def lose_the_copy(world: World, step: Step) -> None:
        if step.name == "lose machine":
            names = [found["path"] for part in world.tables.files.list() for found in part if "/checkpoints/" in found["path"]]
            world.tables.files.delete(names)

    monkeypatch.setattr(runner, "_disturb", lose_the_copy)
    assert runner.run(LOST).failure is not None


def _drop_ledger(world: World) -> None:
    """Delete the ledger's rows of the newest events, as a hand would."""
    DeltaTable(str(world.home / "lakehouse" / "batch_ledger")).delete("stream = 'events' and accepted > 0")


def _count_twice(world: World) -> None:
    """Add the rows of events once more."""
    table = DeltaTable(str(world.home / "lakehouse" / "events"))
    write_deltalake(table, table.to_pyarrow_table(), mode="append")


@pytest.mark.parametrize(("plant", "invariant"), [(_drop_ledger, "ledger"), (_count_twice, "events")])
def test_a_planted_fault_is_found_at_its_step(runner: Runner, plant, invariant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_disturb", lambda world, step: plant(world) if step.name == "ingest" else None)
    failure = runner.run(History(1, (LAND, INGEST, LAND))).failure
    assert failure is not None
    assert (failure.invariant, failure.step) == (invariant, 1), failure.message


class _Faulty(Command):
    """An ingest that loses rows of the ledger."""

    def run(self, world: World, arguments: dict[str, object]) -> None:
        super().run(world, {})
        _drop_ledger(world)


def test_a_failing_history_is_shrunk_shown_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = History(
        7, (Step("status", {}), LAND, Step("compact", {}), Step("move clock", {"days": 1}), INGEST, Step("status", {})), 100
    )
    monkeypatch.setitem(registry.STEPS, "ingest", _Faulty("ingest", 1))
    monkeypatch.setattr(registry, "draw_history", lambda seed, steps, *, in_store: drawn)
    assert run(["chaos", "--seed", "7", "--out", str(tmp_path), "--shrink", "12"]) == 1
    shown = capsys.readouterr().out
    path = tmp_path / "chaos-7.json"
    assert f"run it again: adtally chaos --replay {path}" in shown
    assert [step.name for step in read_history(path).steps] == ["land", "ingest"]
    assert "1. land (number 1, records 25)\n  2. ingest\n" in shown
    assert run(["chaos", "--replay", str(path), "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["failures"]
    assert (found["failure"]["invariant"], found["failure"]["step"]) == ("ledger", 1)
    monkeypatch.setitem(registry.STEPS, "ingest", Command("ingest", 1))  # the fault is mended: the same history holds
    assert run(["chaos", "--replay", str(path)]) == 0


def test_shrinking_stops_at_its_bound(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_disturb", lambda _world, step: require(step.name != "move clock", "planted", "always"))
    moves = History(1, tuple(Step("move clock", {"days": days}) for days in range(8)))
    failed = runner.run(moves.with_steps((Step("land", {"number": 2, "records": 8}), *moves.steps)))
    seen: list[int] = []
    shrunk = runner.shrink(failed, tries=1, watch=lambda done, _left: seen.append(done))
    assert (shrunk.tries, seen, shrunk.failure.invariant) == (1, [1], "planted")
    assert [step.name for step in runner.shrink(failed, tries=9).history.steps] == ["move clock"]


def test_the_steps_are_told_before_they_run(runner: Runner) -> None:
    told: list[str] = []
    assert runner.run(History(1, (LAND,)), lambda _number, text: told.append(text)).failure is None
    assert told == [str(LAND), END]
