"""Small files that are parsed together come out as each by itself."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import is_dataclass
from pathlib import Path

import lake
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spark_jobs.ingest import stage, write
from spark_jobs.ingest.contract.spec import BatchLimits
from spark_jobs.ingest.event_columns import CAMPAIGN_SCHEMA
from spark_jobs.ingest.files import small_files
from spark_jobs.ingest.files.landing import Split
from spark_jobs.ingest.stage import StageTask, stage_split, stage_splits, staged
from spark_jobs.ingest.write import SplitRows, WriteJob, write_splits
from spark_jobs.lake.stamp import Stamp
from spark_jobs.lake.tables import REJECTED_EVENTS
from spark_jobs.traffic.rules import no_rules

_LIMITS = BatchLimits(ingested_us=1_748_858_400_000_000, earliest_us=0, future_skew_us=3 * 10**8, hour_grace_us=9 * 10**8)
_PRICES = CAMPAIGN_SCHEMA.empty_table()
_NONE = np.array([], dtype=np.int64)


def _line(number: int, **fields: object) -> bytes:
    return lake.lines([lake.event(f"e{number}", **fields)])


FILES = {
    "eu/long": b"x" * 70_000 + b"\n" + _line(10),
    "eu/large": b"".join(_line(100 + i) for i in range(300)),
    "eu/cut-alone": b'{"event_id": "cut',
    "eu/good": _line(1) + _line(2),
    "eu/empty": b"",
    "eu/blank": b"\n\n" + _line(3) + b"\n",
    "eu/cut": _line(4) + b'{"event_id": "cut',
    "eu/unterminated": _line(5)[:-1],
    "eu/not-utf8": _line(6) + b"\xff\xfe\n" + _line(7),
    "eu/crlf": _line(8)[:-1] + b"\r\n",
    "eu/odd": b'{"event_id":"x"}\n' + _line(9, user_id="\u00fc\u0001", price_micros=7) + b"[1]\n",
    "us/wrong-region": _line(11, region="eu"),
    "us/one": _line(12),
    "us/two": b"nonsense\n" + _line(13),
}


def _tasks(folder: Path, scratch: str) -> list[StageTask]:
    made = []
    for number, (name, content) in enumerate(FILES.items()):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content)
        split = Split(number, str(path), f"events/{name}.jsonl", name.split("/")[0], 0, None, len(content))
        made.append(StageTask("events", split, _LIMITS, str(folder / scratch)))
    gone = Split(len(made), str(folder / "gone.jsonl"), "events/us/gone.jsonl", "us", 0, None, 1)
    return [*made, StageTask("events", gone, _LIMITS, str(folder / scratch))]


def _kept(task: StageTask, part: str) -> list[dict[str, object]]:
    return [row for table in staged(task, part, _PRICES, no_rules()) for row in table.to_pylist()]


def _plain(value: object) -> object:
    """What can be compared: arrays as their type and values, objects by their fields."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.tolist()
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return {name: _plain(one) for name, one in vars(value).items()} if is_dataclass(value) else value


def test_small_files_together_come_out_as_each_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = _tasks(tmp_path, "alone")
    expected = [stage_split(task, _PRICES, no_rules()) for task in alone]
    parsed: list[list[int]] = []
    together = small_files.parse_together

    def parse_together(splits: list[Split], *rest: object) -> object:
        parsed.append([split.number for split in splits])
        return together(splits, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "parse_together", parse_together)
    grouped = _tasks(tmp_path, "grouped")
    assert _plain(list(stage_splits(grouped, _PRICES, no_rules()))) == _plain(expected)
    last = [11, 12, 13, 14]  # the last of which is gone: only its reading tells
    assert parsed == [[2, 3, 4, 5, 6, 7, 8, 9, 10], last], "long and large files are parsed by themselves"
    for one, other in zip(alone, grouped, strict=True):
        for part in ("rows", "rejects"):
            assert _kept(one, part) == _kept(other, part), (one.split, part)
    assert sum(split.offered for split in expected) == 16 + 2 + 300 + 4 + 1 + 1


def test_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = [task.split for task in _tasks(tmp_path, "x")]
    monkeypatch.setattr(small_files, "_GROUP_FILES", 3)
    found = list(small_files.groups(splits))
    assert [at for group in found for at in group] == list(range(len(splits)))
    assert max(map(len, found)) == 3
    monkeypatch.setattr(small_files, "_GROUP_FILES", 1000)
    monkeypatch.setattr(small_files, "_GROUP_BYTES", 1)
    assert max(map(len, small_files.groups(splits))) == 2  # an empty one and the next


def test_rows_that_are_gathered_are_written_as_those_of_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = _tasks(tmp_path, "scratch")
    list(stage_splits(tasks, _PRICES, no_rules()))
    nothing = np.array([], dtype=np.uint64)
    work = [SplitRows(task, 10 * number, _NONE, _NONE, nothing, _NONE, {}) for number, task in enumerate(tasks)]
    found = []
    for rows in (1, 1_000_000):
        monkeypatch.setattr(write, "_GATHERED_ROWS", rows)
        uri = str(tmp_path / f"events-{rows}")
        job = WriteJob(True, Stamp("q", 1, 5), _PRICES, no_rules(), None, REJECTED_EVENTS, str(tmp_path / f"rejected-{rows}"), uri)
        written = write_splits(work, job)
        events = pa.concat_tables(pq.read_table(f"{uri}/{file.path}", partitioning=None) for file in written.events)
        assert written.increments is not None
        sums = written.increments.to_pylist()
        found.append((events.to_pylist(), Counter(json.dumps(row, sort_keys=True, default=str) for row in sums)))
    assert found[0] == found[1]
    lines = {(row["source_file"], row["source_line"]) for row in found[0][0]}
    assert {("events/eu/good.jsonl", 30), ("events/eu/good.jsonl", 31), ("events/us/two.jsonl", 131)} <= lines
    assert len(lines) == len(found[0][0])
