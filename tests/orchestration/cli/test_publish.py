"""``adtally publish`` and ``adtally budget``: from Delta through a real Kafka to a budget, and their errors."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from orchestration.cli.app import run
from services.launcher.kafka import Kafka
from spark_jobs.config import Settings
from spark_jobs.operate.health import Signal, read_signal
from tests.spark_jobs.publish.published import NOON, add, publishing, row

DAY = NOON.date().isoformat()


def test_from_delta_to_a_budget(settings: Settings, kafka: Kafka, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, credits = publishing(settings, kafka)
    home = ["--home", str(settings.home_path)]
    add(settings, *range(20), spend_nanos=1_000_500)
    assert not _behind(settings, seconds=300).ok
    assert run([*home, "publish"]) == 0
    out = capsys.readouterr().out
    assert (
        out
        == f"{metrics}: 20 messages of 1 versions, up to version 1 of minute_metrics\n{credits}: nothing new in attributed_orders\n"
    )
    assert _behind(settings, seconds=300).ok
    assert run([*home, "publish", "--json"]) == 0
    assert [each["records"] for each in json.loads(capsys.readouterr().out)["topics"]] == [0, 0]
    assert run([*home, "publish", "--status", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)[0]
    assert (told["version"], told["versions_behind"], told["total_records"]) == (1, 0, 20)
    assert run([*home, "status", "--json"]) == 1  # increments without a batch
    assert json.loads(capsys.readouterr().out)["publications"][0] == told
    campaigns = tmp_path / "campaigns.csv"
    campaigns.write_text(
        "campaign_id,store_id,billing_model,daily_budget_micros,currency,valid_from,valid_to\n"
        "c-1,s,cpc,1000,EUR,2000-01-01T00:00:00Z,\nc-2,s,cpc,4002,EUR,2000-01-01T00:00:00Z,\n"
        f"c-1,s,cpc,9000,EUR,{DAY}T00:00:00Z,\nc-3,s,cpc,1,EUR,2000-01-01T00:00:00Z,{DAY}T00:00:00Z\n"
        "c-4,s,cpc,4001,EUR,2000-01-01T00:00:00Z,\n"
    )
    assert run([*home, "budget", "--once", "--campaigns", str(campaigns), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["campaign_id"]: (each["spend_micros"], each["budget_micros"], each["is_over"]) for each in found["campaigns"]} == {
        "c-0": (4002, None, False),  # four times 1,000,500 nanos, rounded once
        "c-1": (4002, 9000, False),
        "c-2": (4002, 4002, False),
        "c-3": (4002, None, False),
        "c-4": (4002, 4001, True),
    }
    assert found["event_minute"] == (NOON + (row(19)["event_minute"] - NOON)).isoformat()
    assert set(found["offsets_behind"].values()) == {0}
    assert found["events_seconds_behind"] > 0
    assert run([*home, "budget", "--once"]) == 0
    text = capsys.readouterr().out
    assert f"Spend of {DAY}" in text
    assert "offsets behind, by partition" in text


def _behind(settings: Settings, seconds: float) -> Signal:
    return read_signal(settings, "publishing_behind", now=datetime.now(UTC) + timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["publish"], 2, "does not say where to publish"),
        (["publish", "--continuous"], 2, "does not say where to publish"),
        (["publish", "--continuous", "--whole"], 2, "for different runs"),
        (["budget"], 2, "no cluster is known for the topic"),
        (["budget", "--cluster", "x"], 2, "there is no cluster x"),
        (["budget", "--cluster", "x", "--bootstrap-servers", "y:1"], 2, "name two places"),
        (["budget", "--status"], 2, "there is no budget file"),
        (["budget", "--status", "--day", "yesterday"], 2, "does not match"),
        (["budget", "--once", "--bootstrap-servers", "127.0.0.1:1"], 1, "Kafka: "),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    monkeypatch.setattr("services.budget.service._ANSWER_SECONDS", 1.0)
    assert run(["--home", str(tmp_path), *arguments]) == status
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
