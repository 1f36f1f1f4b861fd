"""Stands in for `python -m spark_jobs ingest` when the harness is tested: same options, lines and tables."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HOME, LANDING = Path(os.environ["ADTALLY_HOME"]), Path(os.environ["ADTALLY_LANDING"])
FILES = int(os.environ["ADTALLY_MAX_FILES_PER_BATCH"])
MODELS: dict[str, str] = {}
SEEN: set[str] = set()
stopping = False


def append(name: str, version: int, columns: dict[str, list[Any]]) -> None:
    """One data file and its log entry, which names the batch."""
    table = HOME / "lakehouse" / name
    (table / "_delta_log").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), table / f"{version}.parquet")
    entry = table / "_delta_log" / f"{version:020d}.json"
    scratch = entry.with_suffix(".tmp")
    added, txn = {"add": {"path": f"{version}.parquet"}}, {"txn": {"appId": "q", "version": version}}
    scratch.write_text(f"{json.dumps(txn)}\n{json.dumps(added)}\n")
    scratch.rename(entry)


def batch(number: int, files: list[Path]) -> None:
    """Read, deduplicate, count, write, report."""
    started = time.perf_counter()
    offered, spend, kept = 0, 0, []
    counts: dict[str, Counter[str]] = {"impression": Counter(), "click": Counter()}
    for file in files:
        for line in file.read_text().splitlines():
            event = json.loads(line)
            offered += 1
            if event["event_id"] in SEEN:
                continue
            SEEN.add(event["event_id"])
            kept.append(event["event_id"])
            counts[event["event_type"]][event["placement"]] += 1
            model = MODELS[event["campaign_id"]]
            spend += event["price_micros"] * {"cpcclick": 1000, "cpmimpression": 1}.get(model + event["event_type"], 0)
    append("events", number, {"event_id": kept})
    placements = sorted(counts["impression"] | counts["click"])
    append(
        "minute_metrics",
        number,
        {
            "placement": placements,
            "impressions": [counts["impression"][p] for p in placements],
            "clicks": [counts["click"][p] for p in placements],
            "invalid_impressions": [0] * len(placements),
            "invalid_clicks": [0] * len(placements),
            "spend_nanos": [spend if p == placements[0] else 0 for p in placements],
        },
    )
    append("batch_ledger", number, {"offered": [offered]})
    report = {"stream": "events", "batch_id": number, "offered": offered, "accepted": len(kept)}
    report |= {"duplicate": offered - len(kept), "conflict": 0, "rejected": 0, "late": 0}
    print(json.dumps(report | {"seconds": time.perf_counter() - started}), flush=True)


def stop(_signal: int, _frame: object) -> None:
    global stopping
    stopping = True


def main() -> int:
    assert sys.argv[1:3] == ["ingest", "--json"]
    signal.signal(signal.SIGTERM, stop)
    for row in csv.DictReader((LANDING / "campaigns" / "campaigns.csv").open()):
        MODELS[row["campaign_id"]] = row["billing_model"]
    done: set[Path] = set()
    number = 0
    while True:
        waiting = sorted(set(LANDING.glob("events/*/*.jsonl")) - done, key=lambda f: f.stat().st_mtime_ns)[:FILES]
        if waiting:
            batch(number, waiting)
            done.update(waiting)
            number += 1
        elif "--continuous" not in sys.argv or stopping:
            return 0
        else:
            time.sleep(0.2)


if __name__ == "__main__":
    raise SystemExit(main())
