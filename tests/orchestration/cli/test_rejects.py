"""adtally rejects as a person types it, on tables that the ingest's own code wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import lake
import pytest
from local import LocalEvents, LocalOrders
from terminal import Done

from orchestration.cli import app
from spark_jobs.config import Settings
from spark_jobs.operate.status import read_status

Adtally = Callable[..., Done]
FIRST, SECOND = "events/eu-west/local-0000.jsonl", "events/eu-west/local-0001.jsonl"


@pytest.fixture
def adtally(capsys: pytest.CaptureFixture[str], settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Adtally:
    """Run the command on a home with a conflict, broken lines and a broken order."""
    lake.campaigns(settings)
    monkeypatch.setenv("ADTALLY_HOME", str(settings.home_path))
    events = LocalEvents(settings)
    events.take([lake.event("e1"), lake.event("e1", user_id="another"), lake.event("e2", currency="ZZZ", event_time="never")])
    events.take_content(b'{"event_id": "\x1b[31m"}\n\xff\n[not markup]\n')
    LocalOrders(settings).take([lake.order("o1", total_micros=-1)])

    def call(*arguments: str) -> Done:
        capsys.readouterr()
        status = app.run(list(arguments))
        return Done(status, *capsys.readouterr())

    return call


def test_each_reject_is_shown_with_its_place_reasons_and_text(adtally: Adtally) -> None:
    done = adtally("rejects")
    assert (done.status, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert any(line.startswith(f"{FIRST}, line 2 conflict 1 e1 2025-06-02 12:00:00 {{") and '"another"' in line for line in lines)
    assert any(line.startswith("orders/eu-west/local-0000.jsonl, line 1 ") and '"total_micros": -1' in line for line in lines)
    assert any(line.startswith(f"{SECOND}, line 2 ") and line.endswith("\\xff") for line in lines)
    assert any(line.endswith("[not markup]") for line in lines)
    assert "\x1b" not in done.out and "\\x1b[31m" in done.out
    assert lines[-1] == "6 records rejected or in conflict"


def test_the_counts_are_those_of_the_rows_and_of_status(adtally: Adtally, settings: Settings) -> None:
    found = json.loads(adtally("rejects", "--json").out)
    assert found["records"] == len(found["rejects"]) == 6
    counted: dict[tuple[str, str], int] = {}
    for row in found["rejects"]:
        for reason in row["reasons"]:
            counted[row["stream"], reason] = counted.get((row["stream"], reason), 0) + row["records"]
    assert {(row["stream"], row["reason"]): row["records"] for row in found["counts"]} == counted
    assert counted["events", "conflict"] == 1 and len(counted) > 3
    (conflict,) = [row for row in found["rejects"] if row["reasons"] == ["conflict"]]
    assert conflict["fingerprint"] != conflict["accepted_fingerprint"] and len(conflict["fingerprint"]) == 16
    assert {(row.stream, row.reason): row.records for row in read_status(settings).rejects} == counted
    assert "by reason (adtally rejects)" in adtally("status").out


def test_they_are_narrowed_by_reason_time_and_file(adtally: Adtally) -> None:
    def files(*arguments: str) -> list[str]:
        return [row["file"] for row in json.loads(adtally("rejects", "--json", *arguments).out)["rejects"]]

    assert files("--reason", "conflict") == [FIRST]
    assert files("--reason", "no_such_reason") == []
    assert files("--since", "2025-06-02T12:00:01Z") == [SECOND] * 3
    assert files("--file", "local-0001") == [SECOND] * 3
    assert files("--file", "%") == []
    assert files("--file", FIRST, "--reason", "conflict", "--since", "2025-06-02") == [FIRST]


def test_a_limit_is_of_the_rows_not_of_the_counts(adtally: Adtally) -> None:
    found = json.loads(adtally("rejects", "--limit", "1", "--json").out)
    assert found["records"] == 6 and [row["file"] for row in found["rejects"]] == [SECOND]
    shown = adtally("rejects", "--limit", "1").out.splitlines()[-1]
    assert shown == "6 records rejected or in conflict, 1 of them shown: --limit shows more, --json all of each"


def test_a_flood_is_one_row_that_counts(adtally: Adtally, settings: Settings) -> None:
    LocalEvents(settings.model_copy(update={"max_reject_rows": 2}), "flood").take_content(b"{}\n" * 5)
    found = json.loads(adtally("rejects", "--file", "flood", "--json").out)
    assert found["records"] == 5 and sorted(row["records"] for row in found["rejects"]) == [1, 1, 3]
    assert "line 3 and others" in adtally("rejects", "--file", "flood").out


def test_nothing_is_said_plainly(capsys: pytest.CaptureFixture[str], settings: Settings, tmp_path: Path) -> None:
    for home in (settings.home_path, tmp_path / "new"):
        assert app.run(["--home", str(home), "rejects"]) == 0
        assert capsys.readouterr().out == "nothing is rejected or in conflict\n"
    assert app.run(["rejects", "--since", "yesterday"]) == 2
