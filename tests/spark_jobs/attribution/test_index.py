"""The index of rows by key and time, against a dict: whatever was appended, merged, restated.

What it shares with other indexes is tested in tests/spark_jobs/lake/test_runs.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from spark_jobs.attribution.index import KEY_FIELDS, RowCodec, RowIndex

PAYLOAD = pa.schema([("name", pa.string())])
Row = tuple[int, int, int, int, bool, str]


def table(rows: list[Row]) -> pa.Table:
    schema = pa.schema([*KEY_FIELDS, *PAYLOAD])
    columns = zip(*rows, strict=True) if rows else [()] * 6
    return pa.table([pa.array(list(c), f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def words(*values: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, dtype=np.uint64)


def asked(index: RowIndex, queries: list[tuple[int, int, int, int]]) -> list[list[str]]:
    low, high = (words(*(query[n] for query in queries)) for n in (0, 1))
    start, end = (np.array([query[n] for query in queries], dtype=np.int64) for n in (2, 3))
    number, rows = index.between(low, high, start, end)
    found: list[list[str]] = [[] for _ in queries]
    for query, name in zip(number.tolist(), rows["name"].to_pylist(), strict=True):
        found[query].append(name)
    assert number.tolist() == sorted(number.tolist())
    return found


@pytest.mark.parametrize("seed", range(4))
def test_it_finds_what_a_dict_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(RowCodec, "small_run_rows", 4)
    monkeypatch.setattr(RowCodec, "max_run_rows", 300)
    generator = np.random.default_rng(seed)
    index = RowIndex(tmp_path, PAYLOAD)
    index.rebuild("t", [table([(1, 1, 5, 9, True, "first")])], 0)
    held: dict[tuple[int, int, int, int], tuple[bool, str]] = {(1, 1, 5, 9): (True, "first")}
    for version in range(1, 41):
        rows: list[Row] = []
        for number in range(int(generator.integers(0, 20))):
            low, high, at, own = (int(generator.integers(0, bound)) for bound in (4, 2, 30, 6))
            row = (low, high, at, own, bool(generator.random() < 0.8), f"v{version}-{number}")
            rows.append(row)
            held[row[:4]] = (row[4], row[5])
        index.append(table(rows), version)
        if version % 7 == 0:
            index = RowIndex(tmp_path, PAYLOAD)  # as another process finds it
        assert (index.table_id, index.version) == ("t", version)
        queries = [
            (int(low), high, start, end) for low in range(5) for high in range(2) for start, end in ((0, 30), (7, 9), (12, 12))
        ]
        expected = [
            [
                held[key][1]
                for key in sorted(held, key=lambda k: k[2:])
                if key[:2] == q[:2] and q[2] <= key[2] < q[3] and held[key][0]
            ]
            for q in queries
        ]
        assert asked(index, queries) == expected
    assert len(index.runs) < 12
    assert {run.name for run in index.runs} == {path.name for path in tmp_path.glob("run-*")}


def test_no_row_and_no_query(tmp_path: Path) -> None:
    index = RowIndex(tmp_path, PAYLOAD)
    assert asked(index, []) == [] and asked(index, [(1, 1, 0, 9)]) == [[]]
    index.rebuild("t", [table([])], 3)
    assert index.runs == [] and asked(index, [(1, 1, 0, 9)]) == [[]]


def test_an_index_with_a_different_shape_is_discarded(tmp_path: Path) -> None:
    RowIndex(tmp_path, PAYLOAD, "one").rebuild("t", [table([(1, 1, 1, 1, True, "a")])], 3)
    assert RowIndex(tmp_path, PAYLOAD, "one").version == 3
    for other in (RowIndex(tmp_path, PAYLOAD, "two"), RowIndex(tmp_path, pa.schema([("name", pa.int64())]), "one")):
        assert (other.table_id, other.version, other.runs) == (None, -1, [])
    (run,) = tmp_path.glob("run-*")
    run.write_bytes(run.read_bytes()[:100])
    assert RowIndex(tmp_path, PAYLOAD, "one").table_id is None
