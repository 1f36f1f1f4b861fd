"""adtally release as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import lake
import pytest
from local import LocalEvents
from terminal import Done

from orchestration.cli import app
from spark_jobs.config import load_settings
from spark_jobs.lake.writes import ensure_tables

NAME = "events/eu-west/local-0000.jsonl"


def test_a_quarantined_file_is_listed_and_released(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adtally(*arguments: str) -> Done:
        capsys.readouterr()
        status = app.run(list(arguments))
        return Done(status, *capsys.readouterr())

    home = load_settings(home=tmp_path / "home", max_rejects_per_file=10)
    ensure_tables(home)
    lake.campaigns(home)
    monkeypatch.setenv("ADTALLY_HOME", str(home.home_path))
    assert adtally("release", "--list").out == "nothing is quarantined\n"
    LocalEvents(home).take_content(b"\n" * 11)
    shown = f"{NAME}: too_many_rejects: 11 of the first 11 records are rejected"
    assert adtally("release", "--list").out == f"{shown}\n"
    assert adtally("release", NAME).status == 2  # why?
    assert adtally("release").status == 2
    done = adtally("release", NAME, "--reason", "the limit is raised", "--by", "me")
    released = NAME.replace(".jsonl", ".released-local-0.jsonl")
    assert (done.status, done.out) == (0, f"released: adtally ingest reads it as {released}\n")
    assert (home.landing_path / released).exists()
    assert adtally("release", "--list").out == f"{shown}; released as {released}\n"
    (one,) = json.loads(adtally("release", "--list", "--json").out)["quarantine"]
    assert (one["source_file"], one["released_as"]) == (NAME, released)
    again = adtally("release", NAME, "--reason", "again")
    assert again.status == 2 and "is released already" in again.err and "Traceback" not in again.err
