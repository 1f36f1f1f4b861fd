"""The input is what expected.json says it is, by a reader that shares nothing with the generator."""

from __future__ import annotations

import csv
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks.make_input import InputSpec, input_file, make_input, prefix_view

SPEC = InputSpec(batch=4000, files_per_batch=4)


def read(root: Path) -> list[dict[str, Any]]:
    """All events in the order of the files' times."""
    files = sorted(root.glob("events/*/*.jsonl"), key=lambda f: f.stat().st_mtime)
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_expected_counts_are_true(tmp_path: Path) -> None:
    expected = make_input(tmp_path, 12_000, SPEC)
    models = {row["campaign_id"]: row["billing_model"] for row in csv.DictReader((tmp_path / "campaigns" / "campaigns.csv").open())}
    first: dict[str, dict[str, Any]] = {}
    positions: dict[str, int] = {}
    within = earlier = 0
    for position, event in enumerate(read(tmp_path)):
        if (seen := first.get(event["event_id"])) is not None:
            assert {k: v for k, v in event.items() if k not in ("received_at", "region")} == {
                k: v for k, v in seen.items() if k not in ("received_at", "region")
            }
            same = positions[event["event_id"]] // SPEC.batch == position // SPEC.batch
            within, earlier = within + same, earlier + (not same)
        else:
            first[event["event_id"]] = event
            positions[event["event_id"]] = position
    spend = 0
    for event in first.values():
        model = models[event["campaign_id"]]
        if (model, event["event_type"]) == ("cpc", "click"):
            spend += event["price_micros"] * 1000
        if (model, event["event_type"]) == ("cpm", "impression"):
            spend += event["price_micros"]
    last = expected["after_batch"][-1]
    clicks = sum(e["event_type"] == "click" for e in first.values())
    assert last == {
        "offered": 12_000,
        "unique": len(first),
        "duplicates": within + earlier,
        "impressions": len(first) - clicks,
        "clicks": clicks,
        "spend_nanos": spend,
    }
    assert last["duplicates"] == 600
    assert earlier == 200  # half of those of the second and the third batch
    assert clicks > 0


def test_events_keep_the_contract(tmp_path: Path) -> None:
    make_input(tmp_path, 4000, SPEC)
    ad_campaign: dict[str, str] = {}
    for event in read(tmp_path):
        assert datetime.fromisoformat(event["event_time"]) <= datetime.fromisoformat(event["received_at"])
        assert ad_campaign.setdefault(event["ad_id"], event["campaign_id"]) == event["campaign_id"]
        assert ("impression_id" in event) == (event["event_type"] == "click")
        assert isinstance(event["price_micros"], int)
    size = sum(f.stat().st_size for f in tmp_path.glob("events/*/*"))
    assert 330 <= size / 4000 <= 380


def test_longer_input_continues_the_shorter(tmp_path: Path) -> None:
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    make_input(grown, 4000, SPEC)
    make_input(grown, 8000, SPEC)
    assert make_input(whole, 8000, SPEC) == json.loads((grown / "expected.json").read_text())
    for index in range(8):
        assert input_file(grown, index).read_bytes() == input_file(whole, index).read_bytes()
    times = [input_file(grown, index).stat().st_mtime for index in range(8)]
    assert times == sorted(set(times))


def test_view_holds_the_first_batches(tmp_path: Path) -> None:
    make_input(tmp_path / "all", 8000, SPEC)
    prefix_view(tmp_path / "all", tmp_path / "view", 1, SPEC)
    assert read(tmp_path / "view") == read(tmp_path / "all")[:4000]


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole number"):
        InputSpec(batch=10, files_per_batch=3)
    with pytest.raises(ValueError, match="whole number"):
        make_input(tmp_path, 4001, SPEC)
    make_input(tmp_path, 4000, SPEC)
    with pytest.raises(ValueError, match="another input"):
        make_input(tmp_path, 4000, InputSpec(batch=4000, files_per_batch=4, seed=8))
