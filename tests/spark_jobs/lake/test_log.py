"""Delta logs written by hand: what a commit says, and how far the search for a transaction goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from spark_jobs.errors import TableCorruptionError
from spark_jobs.lake.log import Commit, DeltaLog, _listed, parse_commit
from spark_jobs.lake.places import LocalPlace

FILE = {"path": "event_date=2025-06-02/part-0.parquet", "partitionValues": {}, "size": 1, "modificationTime": 0}
ADD = {**FILE, "dataChange": True, "stats": '{"numRecords":2}'}
REMOVE = {"path": "part-1.parquet", "deletionTimestamp": 0, "dataChange": True}


def text_of(*actions: dict[str, Any]) -> str:
    """A commit as Delta writes it: an action a line, nothing but control characters escaped."""
    return "".join(json.dumps(action, ensure_ascii=False, separators=(",", ":")) + "\n" for action in actions)


def txn(app_id: str, version: int) -> dict[str, Any]:
    return {"txn": {"appId": app_id, "version": version, "lastUpdated": 0}}


def write(table: Path, version: int, *actions: dict[str, Any]) -> None:
    (table / "_delta_log").mkdir(parents=True, exist_ok=True)
    (table / "_delta_log" / f"{version:020d}.json").write_text(text_of(*actions or [{"commitInfo": {}}]), "utf-8")


def test_all_that_a_commit_says() -> None:
    info = {"timestamp": 1, "operation": "WRITE", "userMetadata": '{"files":[]}', "txnId": "x"}
    commit = parse_commit(
        3,
        text_of(
            {"commitInfo": info},
            {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}},
            {"metaData": {"id": "table-1", "schemaString": "{}", "partitionColumns": []}},
            txn("query", 7),
            {"add": ADD},
            {"remove": REMOVE},
            {"add": {**ADD, "path": "b"}},
            {"domainMetadata": {"domain": "d", "configuration": "", "removed": False}},
        ),
    )
    assert commit == Commit(3, ("query", 7), '{"files":[]}', (ADD, {**ADD, "path": "b"}), (REMOVE,), "table-1", info, {"query": 7})


@pytest.mark.parametrize(
    "text, info",
    [
        (text_of({"commitInfo": {"operation": "OPTIMIZE"}}), {"operation": "OPTIMIZE"}),
        (text_of({"commitInfo": {}}).rstrip(), {}),
    ],
)
def test_a_commit_that_says_nothing(text: str, info: dict[str, Any]) -> None:
    commit = parse_commit(0, text)
    assert commit == Commit(0, info=info)
    assert not commit.changes_rows


@pytest.mark.parametrize(
    ("actions", "changes", "added", "removed"),
    [
        pytest.param([{"add": ADD}], True, 1, 0, id="append"),
        pytest.param([{"remove": REMOVE}], True, 0, 1, id="delete"),
        pytest.param([{"add": ADD}, {"remove": REMOVE}], True, 1, 1, id="rewrite"),
        pytest.param(
            [{"add": {**ADD, "dataChange": False}}, {"remove": {**REMOVE, "dataChange": False}}], False, 0, 0, id="compaction"
        ),
        pytest.param([{"add": {**ADD, "dataChange": False}}, {"add": ADD}], True, 1, 0, id="both"),
        pytest.param([{"add": FILE}], True, 1, 0, id="a change unless it says that it is none"),
        pytest.param([txn("q", 0)], False, 0, 0, id="an empty append"),
    ],
)
def test_which_commits_change_rows(actions: list[dict[str, Any]], changes: bool, added: int, removed: int) -> None:
    commit = parse_commit(1, text_of(*actions))
    assert (commit.changes_rows, len(commit.data_added), len(commit.data_removed)) == (changes, added, removed)
    assert len(commit.added) + len(commit.removed) == sum(1 for action in actions if "txn" not in action)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\u001c", "\v", "\f", "\r", "\n", "\r\n"])
def test_a_line_separator_within_a_string_ends_no_action(tmp_path: Path, separator: str) -> None:
    """Delta keeps the least and the greatest order_id of a file, whatever characters an order_id has."""
    stats = json.dumps({"minValues": {"order_id": f"a{separator}b"}}, ensure_ascii=False)
    write(tmp_path, 0, {"commitInfo": {"userMetadata": f"x{separator}y"}}, txn("q", 1), {"add": {**ADD, "stats": stats}})
    commit = DeltaLog(str(tmp_path)).commit(0)
    assert commit is not None
    assert (commit.user_metadata, commit.txn) == (f"x{separator}y", ("q", 1))
    assert json.loads(commit.added[0]["stats"])["minValues"]["order_id"] == f"a{separator}b"


def test_no_table(tmp_path: Path) -> None:
    log = DeltaLog(str(tmp_path / "nothing"))
    assert (log.exists(), log.latest_version(), log.commit(0), list(log.commits_backwards())) == (False, None, None, [])
    assert log.find_transaction("q", 0) is None
    (tmp_path / "empty" / "_delta_log").mkdir(parents=True)
    assert (DeltaLog(str(tmp_path / "empty")).exists(), DeltaLog(str(tmp_path / "empty")).latest_version()) == (False, None)


def test_only_commits_are_versions(tmp_path: Path) -> None:
    for version in (0, 9, 10):
        write(tmp_path, version)
    for name in (
        "00000000000000000011.json.crc",
        ".00000000000000000012.json.tmp",
        "00000000000000000013.checkpoint.parquet",  # empty: torn by a power cut
        "00000000000000000014.crc",
        "_last_checkpoint",
        "15.json",
    ):
        (tmp_path / "_delta_log" / name).touch()
    (tmp_path / "_delta_log" / "_commits").mkdir()
    assert DeltaLog(str(tmp_path)).latest_version() == 10


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        pytest.param(["{:020d}.checkpoint.parquet"], 11, id="one file"),
        pytest.param(["{:020d}.checkpoint.0000000001.0000000002.parquet"], 10, id="a part of it is missing"),
        pytest.param([f"{{:020d}}.checkpoint.000000000{part}.0000000002.parquet" for part in (1, 2)], 11, id="all parts"),
        pytest.param(["{:020d}.checkpoint.0c4ac1b2-7d1e-4d2f-9c39-8f8d9d1e5e77.parquet"], 11, id="named by a UUID"),
        pytest.param(["{:020d}.checkpoint.0c4ac1b2-7d1e-4d2f-9c39-8f8d9d1e5e77.json"], 11, id="as JSON"),
        pytest.param([".{:020d}.checkpoint.parquet.tmp", "00000000000000000000.{:020d}.compacted.json"], 10, id="neither"),
    ],
)
@pytest.mark.parametrize("versions", [(9, 10), (10,)], ids=["with commits", "with the last one"])
def test_a_checkpoint_makes_a_version_without_its_commit(
    tmp_path: Path, names: list[str], newest: int, versions: tuple[int, ...]
) -> None:
    for version in versions:
        write(tmp_path, version)
    for name in names:
        (tmp_path / "_delta_log" / name.format(11)).write_bytes(b"PAR1")
    assert (DeltaLog(str(tmp_path)).exists(), DeltaLog(str(tmp_path)).latest_version()) == (True, newest)


def test_a_log_with_nothing_but_a_checkpoint_is_a_table(tmp_path: Path) -> None:
    uri = str(tmp_path / "t")
    for number in range(3):
        write_deltalake(uri, pa.table({"number": [number]}), mode="append")
    table_id = DeltaLog(uri).table_id()
    DeltaTable(uri).create_checkpoint()
    for commit in (tmp_path / "t" / "_delta_log").glob("*.json"):
        commit.unlink()
    log = DeltaLog(uri)
    assert (log.exists(), log.latest_version(), log.table_id(), log.commit(2)) == (True, 2, table_id, None)
    assert (list(log.commits_backwards()), log.commits(1, 2)) == ([], None)
    assert DeltaTable(uri).version() == 2


def test_the_commits_between_two_versions(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        write(tmp_path, version, {"add": ADD}, {"remove": REMOVE}, {"add": {**ADD, "path": "moved", "dataChange": False}})
    log = DeltaLog(str(tmp_path))
    found = log.commits(1, 3)
    assert found is not None and [commit.version for commit in found] == [2, 3]
    assert [(commit.added_paths, commit.removed_paths) for commit in found] == [([ADD["path"]], [REMOVE["path"]])] * 2
    assert (log.commits(3, 3), log.commits(-1, 3), log.commits(1, 4)) == ([], None, None)


def test_commits_backwards(tmp_path: Path) -> None:
    for version in range(5):
        write(tmp_path, version, txn("q", version))
    log = DeltaLog(str(tmp_path))
    assert [commit.version for commit in log.commits_backwards()] == [4, 3, 2, 1, 0]
    assert [commit.version for commit in log.commits_backwards(2)] == [2, 1, 0]
    assert list(log.commits_backwards(7)) == []


def test_a_log_that_was_cleaned_up_begins_later(tmp_path: Path) -> None:
    for version in (0, 1, 4, 5):
        write(tmp_path, version, txn("q", version))
    log = DeltaLog(str(tmp_path))
    assert [commit.version for commit in log.commits_backwards()] == [5, 4]
    assert (log.commit(3), log.find_transaction("q", 1)) == (None, None)
    found = log.find_transaction("q", 4)
    assert found is not None and found.version == 4


def test_only_the_log_since_the_last_checkpoint_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of it where the hint is damaged, or names a version that the log does not have."""
    for version in range(6):
        write(tmp_path, version)
    (tmp_path / "_delta_log" / f"{4:020d}.checkpoint.parquet").write_bytes(b"PAR1")
    looked: list[str] = []
    find = LocalPlace.find

    def note_and_find(place: LocalPlace, name: str) -> Any:
        looked.append(name)
        return find(place, name)

    monkeypatch.setattr(LocalPlace, "find", note_and_find)
    hint = tmp_path / "_delta_log" / "_last_checkpoint"
    for text, expected in (('{"version":4,"size":1}', 4), ("{", 8), ('{"version":7}', 9)):
        hint.write_text(text)
        looked.clear()
        _listed.clear()
        assert (DeltaLog(str(tmp_path)).latest_version(), len(looked)) == (5, expected)
    hint.write_text('{"version":4}')
    write(tmp_path, 6)
    (tmp_path / "_delta_log" / f"{6:020d}.json").write_text("")
    assert [fault.version for fault in DeltaLog(str(tmp_path)).tail_faults()] == [6]
    for version in (4, 5):
        (tmp_path / "_delta_log" / f"{version:020d}.json").write_text("")
    assert [fault.version for fault in DeltaLog(str(tmp_path)).tail_faults()] == [4, 5, 6]


def test_find_a_transaction(tmp_path: Path) -> None:
    write(tmp_path, 0)
    write(tmp_path, 1, txn("q", 0))
    write(tmp_path, 2, txn("other", 5), {"add": ADD})
    write(tmp_path, 3, txn("q", 1), {"commitInfo": {"userMetadata": "plan"}})
    write(tmp_path, 4, {"add": {**ADD, "dataChange": False}})
    write(tmp_path, 5, txn("other", 6))
    log = DeltaLog(str(tmp_path))
    versions = {
        (app, number): getattr(log.find_transaction(app, number), "version", None) for app in ("q", "other") for number in range(8)
    }
    assert {key: version for key, version in versions.items() if version is not None} == {
        ("q", 0): 1,
        ("q", 1): 3,
        ("other", 5): 2,
        ("other", 6): 5,
    }
    found = log.find_transaction("q", 1)
    assert found is not None and found.user_metadata == "plan"
    assert log.find_transaction("Q", 1) is None


def test_the_search_ends_at_an_earlier_transaction_of_the_query(tmp_path: Path) -> None:
    """A new batch, the usual case, costs one commit, however long the log is."""
    write(tmp_path, 0, txn("q", 0))
    write(tmp_path, 1, txn("q", 1))
    write(tmp_path, 2, txn("q", 2))
    write(tmp_path, 3, txn("other", 0))
    for version in (0, 1):
        (tmp_path / "_delta_log" / f"{version:020d}.json").write_text("whoever reads this fails")
    log = DeltaLog(str(tmp_path))
    assert log.find_transaction("q", 3) is None
    assert getattr(log.find_transaction("q", 2), "version", None) == 2
    with pytest.raises(TableCorruptionError, match="Expecting value"):
        log.find_transaction("another", 1)


def test_a_table_by_its_uri(tmp_path: Path) -> None:
    write(tmp_path / "a table", 0, txn("q", 1))
    log = DeltaLog(f"file://{tmp_path}/a%20table")
    assert (log.latest_version(), log.commit(0), log.commit(1)) == (0, Commit(0, ("q", 1), transactions={"q": 1}), None)


WHOLE = text_of({"commitInfo": {}}, txn("q", 1), {"add": ADD})
TORN = {"empty": "", "blank": "\n", "cut off": WHOLE[: len(WHOLE) // 2], "zeros": "\0" * len(WHOLE), "no action": "1\n"}


@pytest.mark.parametrize("text", TORN.values(), ids=TORN.keys())
def test_a_torn_commit_is_no_empty_version(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError):
        parse_commit(0, text)
    for version in (0, 1, 2):
        write(tmp_path, version, txn("q", version))
    (tmp_path / "_delta_log" / f"{2:020d}.json").write_text(text)
    log = DeltaLog(str(tmp_path))
    for read in (log.latest_version, lambda: log.commit(2), lambda: list(log.commits_backwards())):
        with pytest.raises(TableCorruptionError, match=r"0002\.json is not a whole commit: .*adtally ingest"):
            read()
    assert [fault.version for fault in log.tail_faults()] == [2]
    assert [(fault.version, fault.is_tail) for fault in log.faults()] == [(2, True)]


@pytest.mark.parametrize("text", TORN.values(), ids=TORN.keys())
def test_damage_in_the_middle_of_a_log_is_no_torn_tail(tmp_path: Path, text: str) -> None:
    for version in (0, 1, 2, 4):
        write(tmp_path, version, txn("q", version))
    (tmp_path / "_delta_log" / f"{1:020d}.json").write_text(text)
    log = DeltaLog(str(tmp_path))
    assert log.tail_faults() == []
    assert [(fault.version, fault.is_tail) for fault in log.faults()] == [(1, False), (3, False)]
    with pytest.raises(TableCorruptionError, match=r"0001\.json is not a whole commit: .*adtally fsck"):
        log.commit(1)
    if not text:  # seen in the listing of the log, whatever is read
        with pytest.raises(TableCorruptionError, match=r"0001\.json is not a whole commit: it is empty .*adtally fsck"):
            log.latest_version()
