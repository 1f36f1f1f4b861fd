"""Copies of checkpoints in a store: what another machine gets, who may plan a batch, and a kill at each request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from store import lost_after

from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import LeaseLostError
from spark_jobs.lake.checkpoint_copy import CheckpointCopy, checkpoint_copy, checkpoints_to_read, set_aside
from spark_jobs.lake.places import open_place


@pytest.fixture
def machine(prefix: str, tmp_path: Path) -> Callable[[str], Settings]:
    """Settings of a machine: another home, another path of the landing folder, the same lakehouse."""
    return lambda name: load_settings(
        home=tmp_path / name / "home", lakehouse=prefix, landing=tmp_path / name / "landing é +1", lease_seconds=2
    )


def opened(settings: Settings) -> CheckpointCopy:
    copy = checkpoint_copy(settings, "events")
    assert copy is not None
    return copy


def write(settings: Settings, name: str, *lines: object) -> None:
    path = settings.checkpoints_path / "events" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["v1", *(json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in lines)]))
    path.with_name(f".{path.name}.crc").write_bytes(b"crc")


def listed(settings: Settings, file: str, batch: int) -> dict[str, object]:
    """An entry of Spark's list of files."""
    landing = str(settings.landing_path).replace(" ", "%20")
    return {"path": f"file://{landing}/events/eu/{file}", "timestamp": 1, "batchId": batch}


def plan(settings: Settings, batch: int, *files: str, at: int = 1) -> None:
    """Write what Spark writes before a batch, and that the batch before it has ended."""
    if batch == 0:
        path = settings.checkpoints_path / "events" / "metadata"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"id": f"query of {settings.home_path}"}))
    else:
        write(settings, f"commits/{batch - 1}", {})
    write(settings, f"sources/0/{batch}", *(listed(settings, file, batch) for file in files or (f"{batch}.jsonl",)))
    write(settings, f"offsets/{batch}", {"batchTimestampMs": at}, {"logOffset": batch})


def contents(folder: Path) -> dict[str, str]:
    visible = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in visible}


def test_a_local_lakehouse_has_no_copy(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    assert checkpoint_copy(settings, "events") is None
    assert checkpoints_to_read(settings) == settings.checkpoints_path


def test_another_machine_gets_the_same_plans_with_its_own_paths(machine: Callable[[str], Settings]) -> None:
    one, two = machine("one"), machine("two")
    copy = opened(one)
    for batch in range(3):
        plan(one, batch)
        copy.add_new()
    first = contents(one.checkpoints_path / "events")
    opened(two).bring_back()
    paths = str(one.landing_path).replace(" ", "%20"), str(two.landing_path).replace(" ", "%20")
    expected = {name: text.replace(*paths) for name, text in first.items()}
    assert contents(two.checkpoints_path / "events") == expected
    assert contents(checkpoints_to_read(two) / "events") == expected
    shutil.rmtree(one.home_path)
    opened(one).bring_back()
    assert contents(one.checkpoints_path / "events") == first


def test_a_batch_that_another_machine_planned_is_refused(machine: Callable[[str], Settings]) -> None:
    one, two = machine("one"), machine("two")
    stopped, taking_over = opened(one), opened(two)
    plan(one, 0)
    stopped.add_new()
    taking_over.bring_back()
    plan(one, 1, "a.jsonl")  # the machine is stopped here
    plan(two, 1, "b.jsonl")
    taking_over.add_new()
    with pytest.raises(LeaseLostError, match="another machine has planned the same batch of query events differently"):
        stopped.add_new()
    again = opened(one)
    again.bring_back()
    assert "b.jsonl" in contents(one.checkpoints_path / "events")["sources/0/1"]
    again.add_new()


def test_a_plan_that_was_not_copied_is_forgotten(machine: Callable[[str], Settings]) -> None:
    one = machine("one")
    copy = opened(one)
    plan(one, 0)
    copy.add_new()
    before = contents(one.checkpoints_path / "events")
    plan(one, 1)
    opened(one).bring_back()
    assert contents(one.checkpoints_path / "events") == before
    assert not list((one.checkpoints_path / "events").rglob(".1.crc"))


def test_old_batches_are_neither_brought_nor_kept(machine: Callable[[str], Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spark_jobs.lake.checkpoint_copy._KEPT_BATCHES", 5)
    monkeypatch.setattr("spark_jobs.lake.checkpoint_copy._OLD_OBJECTS", 20)
    one, two = machine("one"), machine("two")
    copy = opened(one)
    for batch in range(21):
        plan(one, batch)
        if batch % 10 == 9:
            whole = [listed(one, f"{number}.jsonl", number) for number in range(batch + 1)]
            write(one, f"sources/0/{batch}.compact", *whole)
            (one.checkpoints_path / "events" / "sources" / "0" / str(batch)).unlink()
        copy.add_new()
    needed = {
        *("metadata", "sources/0/19.compact", "sources/0/20"),
        *(f"offsets/{number}" for number in range(15, 21)),
        *(f"commits/{number}" for number in range(15, 20)),
    }
    opened(two).bring_back()
    assert contents(two.checkpoints_path / "events").keys() == needed
    shutil.rmtree(one.home_path)  # what is gone locally is not old for that
    copy.delete_old()
    place = open_place(f"{one.state_uri}/checkpoints/events")
    assert {found.name for found in place.list()} == needed


def test_readers_follow_a_checkpoint_that_was_set_aside(machine: Callable[[str], Settings]) -> None:
    one, two = machine("one"), machine("two")
    copy = opened(one)
    plan(one, 0)
    copy.add_new()
    assert (checkpoints_to_read(two) / "events").exists()
    set_aside(two, "events", "set-aside-1")
    assert not (checkpoints_to_read(two) / "events").exists()
    kept = contents(checkpoints_to_read(two) / "events.set-aside-1")
    assert kept.keys() == {"metadata", "sources/0/0", "offsets/0"}


@pytest.mark.parametrize("requests", range(9))
def test_a_machine_lost_after_any_request(
    requests: int, machine: Callable[[str], Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next machine continues from a copy that is whole: it has the list of each plan, and the plans of one query."""

    one, two = machine("one"), machine("two")
    copy = opened(one)
    with monkeypatch.context() as patch, lost_after(requests, "create"):
        patch.setattr("spark_jobs.lake.checkpoint_copy._THREADS", 1)
        for batch in range(5):
            plan(one, batch)
            copy.add_new()
    after = opened(two)
    after.bring_back()
    found = contents(two.checkpoints_path / "events")
    batches = [int(name.removeprefix("offsets/")) for name in found if name.startswith("offsets/")]
    assert all(f"sources/0/{batch}" in found for batch in batches)
    assert ("metadata" in found) == (requests >= 3)
    start = max(batches, default=-1) + 1
    for batch in range(start, start + 2):
        if f"sources/0/{batch}" in found:  # Spark plans it with the files of the list that is there
            write(two, f"offsets/{batch}", {"batchTimestampMs": 2}, {"logOffset": batch})
        else:
            plan(two, batch, "other.jsonl", at=2)
        after.add_new()
