"""The model of the chaos simulator: what a few files must come to, whatever happens to the ingest between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.simulator.chaos.checks import Violation, check_conservation, check_events, check_ledger
from services.simulator.chaos.history import History, Step, read_history
from services.simulator.chaos.model import Model
from services.simulator.chaos.oracle import Landed
from services.simulator.chaos.steps import CRASH_STEPS, IN_A_STORE, ON_A_DISK, STEPS, draw_history
from services.simulator.chaos.traffic import CAMPAIGNS, Shape, Traffic
from services.simulator.errors import SimulationError
from spark_jobs.steps import Step as DurableStep


def _file(name: str, modified_ms: int, *records: tuple[str, int]) -> Landed:
    lines = [
        {
            "event_id": event_id,
            "event_type": "click",
            "event_time": "2025-06-02T10:00:00Z",
            "received_at": "2025-06-02T10:00:02Z",
            "campaign_id": "c-cpc",
            "ad_id": "a-1",
            "store_id": "s-1",
            "user_id": "u-1",
            "currency": "EUR",
            "price_micros": price,
        }
        for event_id, price in records
    ]
    return Landed(f"events/eu-west/{name}", b"".join(json.dumps(line).encode() + b"\n" for line in lines), modified_ms)


def _cell(model: Model) -> dict[str, int]:
    (cell,) = model.books().ledger.values()
    return {name: cell[name] for name in ("offered", "accepted", "duplicate", "conflict", "rejected")}


def test_the_first_in_the_order_of_reading_wins() -> None:
    model = Model(CAMPAIGNS, 1000)
    model.land([_file("b.jsonl", 1000, ("e1", 5)), _file("a.jsonl", 2000, ("e1", 6), ("e1", 5))])
    model.end_ingest()
    assert model.books().events["e1"]["price_micros"] == 5
    assert _cell(model) == {"offered": 3, "accepted": 1, "duplicate": 1, "conflict": 1, "rejected": 0}


def test_a_person_who_was_erased_has_a_token_also_in_later_records() -> None:
    model = Model(CAMPAIGNS, 1000)
    model.land([_file("a.jsonl", 1000, ("e1", 5))])
    model.end_ingest()
    model.erase("u-1", "erased-0")
    model.land([_file("b.jsonl", 2000, ("e1", 5), ("e1", 6), ("e2", 5))])
    model.end_ingest()
    assert {event["user_id"] for event in model.books().events.values()} == {"erased-0"}
    assert _cell(model) == {"offered": 4, "accepted": 2, "duplicate": 1, "conflict": 1, "rejected": 0}


def test_a_lost_checkpoint_offers_everything_again_and_accepts_nothing_twice() -> None:
    model = Model(CAMPAIGNS, 1000)
    model.land([_file("a.jsonl", 1000, ("e1", 5))])
    model.end_ingest()
    model.forget()
    assert not getattr(model, "has_read_all")  # noqa: B009  mypy would take it for constant
    model.land([_file("b.jsonl", 2000, ("e2", 5))])
    model.end_ingest()
    assert _cell(model) == {"offered": 3, "accepted": 2, "duplicate": 1, "conflict": 0, "rejected": 0}
    assert model.has_read_all and model.counts_offered and not model.needs_repair


def test_a_checkpoint_lost_under_a_half_committed_batch_needs_a_repair() -> None:
    model = Model(CAMPAIGNS, 1000)
    model.land([_file("a.jsonl", 1000, ("e1", 5))])
    model.begin_ingest()
    model.forget()
    assert model.needs_repair and not model.counts_offered


def test_the_clock_jumps_back_only_when_all_is_read() -> None:
    model = Model(CAMPAIGNS, 1000)
    model.land([_file("a.jsonl", 1000, ("e1", 5))])
    model.move_clock(1)
    assert model.clock_ms == 2000
    model.end_ingest()
    model.move_clock(1)
    assert model.clock_ms == 1


def test_a_step_lands_the_same_files_whatever_landed_before() -> None:
    traffic = Traffic(Shape(3, 200, 0, 0, 1, 1, 4096))
    first = traffic.landing(7, 25, 1000)
    traffic.landing(8, 25, 5000)
    assert traffic.landing(7, 25, 1000) == first
    assert len({file.modified_ms for file in first}) == len(first)


def test_a_seed_draws_one_history_and_json_keeps_it(tmp_path: Path) -> None:
    history = draw_history(5, 30)
    assert history == draw_history(5, 30) != draw_history(6, 30)
    history.write(tmp_path / "history.json")
    assert read_history(tmp_path / "history.json") == history
    for in_store, never in ((False, IN_A_STORE), (True, ON_A_DISK)):
        drawn = {step.name for seed in range(30) for step in draw_history(seed, 30, in_store=in_store).steps}
        assert drawn == STEPS.keys() - never


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"seed": 1, "steps": [{"name": "land"}]}', '{"seed": 1, "steps": [], "x": 1}']
)
def test_a_file_that_is_no_history_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "history.json"
    path.write_text(content)
    with pytest.raises(SimulationError, match="is no history"):
        read_history(path)


def test_the_durable_steps_of_faults_exist() -> None:
    assert {step for steps in CRASH_STEPS.values() for step in steps} <= {str(step) for step in DurableStep}


class _Rows:
    def __init__(self, **tables: list[dict[str, Any]]) -> None:
        self._tables = tables

    def dicts(self, table: str, columns: str) -> list[dict[str, Any]]:
        names = columns.replace(",", " ").split()
        return [{name: row.get(name) for name in names} for row in self._tables.get(table, [])]


_LEDGER_ROW = {
    "_query_id": "q",
    "_batch_id": 0,
    "stream": "events",
    "source": "files",
    "region": "eu-west",
    "event_hour": 1748858400000000,
    "offered": 2,
    "accepted": 1,
    "duplicate": 1,
    "conflict": 0,
    "rejected": 0,
    "late": 0,
    "unpriced": 0,
    "max_received_at": 1748858402000000,
}


def test_a_row_of_the_ledger_that_does_not_add_up_is_a_violation() -> None:
    check_conservation(_Rows(batch_ledger=[_LEDGER_ROW]))
    with pytest.raises(Violation, match="conservation"):
        check_conservation(_Rows(batch_ledger=[{**_LEDGER_ROW, "duplicate": 0}]))
    with pytest.raises(Violation, match="not unique"):
        check_conservation(_Rows(batch_ledger=[_LEDGER_ROW, _LEDGER_ROW]))


def test_a_ledger_and_events_that_differ_from_the_books_are_violations() -> None:
    model = Model(CAMPAIGNS, 1000)
    model.land([_file("a.jsonl", 1000, ("e1", 5), ("e1", 5))])
    model.end_ingest()
    check_ledger(_Rows(batch_ledger=[_LEDGER_ROW]), model.books(), marks=False)
    with pytest.raises(Violation, match="ledger: 1 differ"):
        check_ledger(_Rows(batch_ledger=[{**_LEDGER_ROW, "offered": 3, "duplicate": 2}]), model.books(), marks=False)
    with pytest.raises(Violation, match="events: 1 differ"):
        check_events(_Rows(), model.books(), marks=False)
    check_events(_Rows(), model.books(waiting=True), marks=False, at_least=[])  # nothing is certainly read


def test_steps_are_shown_with_what_was_drawn() -> None:
    step = Step("killed", {"command": "ingest", "crash_at": None, "kill_after_ms": 30})
    assert str(step) == "killed (command ingest, kill_after_ms 30)"
    assert History(1, (step,)).with_steps(()) == History(1, ())
