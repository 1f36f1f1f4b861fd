"""The cases of tests/cases/contract as lines, and what every test of the contract judges by."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spark_jobs.ingest.contract.spec import BatchLimits

FOLDER = Path(__file__).resolve().parents[3] / "cases" / "contract"

LIMITS = BatchLimits(
    ingested_us=1_748_908_800_000_000,  # 2025-06-03T00:00:00Z
    earliest_us=946_684_800_000_000,  # 2000-01-01T00:00:00Z
    future_skew_us=300_000_000,
    hour_grace_us=900_000_000,
)


@dataclass(frozen=True)
class Case:
    name: str
    stream: str
    raw: bytes
    reasons: list[str]
    gives: dict[str, Any]
    folder: str = "eu"
    terminated: bool = True


def _text(value: Any) -> Any:
    return value["repeat"][0] * value["repeat"][1] if isinstance(value, dict) and "repeat" in value else value


def _raw(base: dict[str, Any], case: dict[str, Any]) -> bytes:
    if "base64" in case:
        return base64.b64decode(case["base64"])
    if "line" in case:
        return str(_text(case["line"])).encode()
    record = {name: value for name, value in base.items() if name not in case.get("remove", ())}
    record |= {name: _text(value) for name, value in case.get("set", {}).items()}
    line = json.dumps(record, separators=(",", ":"), ensure_ascii=False)
    if "replace" in case:
        old, new = case["replace"]
        assert old in line, case["name"]
        line = line.replace(old, new, 1)
    return line.encode()


def base(stream: str) -> dict[str, Any]:
    content = json.loads((FOLDER / f"{stream}.json").read_text("utf-8"))
    return dict(content["base"])


def load(stream: str) -> list[Case]:
    content = json.loads((FOLDER / f"{stream}.json").read_text("utf-8"))
    return [
        Case(
            case["name"],
            stream,
            _raw(content["base"], case),
            case["reasons"],
            case.get("gives", {}),
            case.get("folder", "eu"),
            case.get("terminated", True),
        )
        for case in content["cases"]
    ]
