"""The commands that verify what was billed, and list who changed what."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import correct
import pytest

from orchestration.cli.app import run
from spark_jobs.config import Settings
from spark_jobs.operate.watermark import close_by_hand

NOW = datetime(2025, 6, 10, tzinfo=UTC)


@pytest.fixture
def home(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A home whose hours were closed by hand, twice."""
    monkeypatch.setenv("ADTALLY_HOME", str(settings.home_path))
    for day in (4, 5):
        close_by_hand(settings, datetime(2025, 6, day, tzinfo=UTC), reason="eu-west is down", closed_by="ann", now=NOW)
    return settings


def test_a_whole_chain_is_verified_and_its_head_can_be_expected(home: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "--head"]) == 0
    heads = capsys.readouterr().out.split()
    assert [head.split(":")[:2] for head in heads] == [["hour_closings", "2"], ["audit_log", "2"]]
    assert run(["verify", "--expect", heads[0], "--expect", heads[1]]) == 0
    assert "everything is as it was written" in capsys.readouterr().out
    assert run(["verify", "--expect", heads[0].replace(":2:", ":3:")]) == 1
    assert "hour_closings a row at place 3 removed" in capsys.readouterr().out
    assert run(["verify", "--expect", "head"]) == 2
    assert capsys.readouterr().err == "adtally: error: 'head' is no head of a chain (as `adtally verify --head` prints it)\n"


def test_a_broken_chain_exits_1_and_prints_no_head(home: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    correct.update(home, "hour_closings", "chain_position = 1", reason="'another'")
    assert run(["verify", "--head"]) == 1
    assert "first: chain: hour_closings 2025-06-04 00:00:00+00:00 at place 1 changed" in capsys.readouterr().out
    assert run(["verify", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(one["table"], one["position"], one["kind"]) for one in found["findings"]] == [("hour_closings", 1, "changed")]


def test_the_audit_log_lists_acts(home: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit-log", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [(one["act"], one["user_name"], one["reason"], one["position"]) for one in entries] == [
        ("close", "ann", "eu-west is down", 1),
        ("close", "ann", "eu-west is down", 2),
    ]
    assert run(["audit-log", "--act", "erase"]) == 0
    assert capsys.readouterr().out == "no act is recorded\n"
    assert run(["audit-log", "--act", "nothing"]) == 2
    assert run(["audit-log"]) == 0
    assert "ann" in capsys.readouterr().out


def test_the_command_is_named_without_its_arguments(home: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["hours", "close", "--through", "2025-06-06T00:00:00Z", "--reason", "r"]) == 0
    capsys.readouterr()
    assert run(["audit-log", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[-1]["command"] == "adtally hours"
