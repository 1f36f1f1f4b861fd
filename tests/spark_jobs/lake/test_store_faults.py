"""A store that misbehaves: requests are repeated with a bound, errors are one line with operation and key, rows count once."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, Schema
from deltalake.exceptions import CommitFailedError
from store import fresh_prefix
from store_faults import LIST, Fault, Faults, misbehaving, short_lived_access_key

from spark_jobs.config import load_settings
from spark_jobs.errors import ConfigurationError, StoreError, TableCorruptionError
from spark_jobs.lake import commit as commits
from spark_jobs.lake import duck
from spark_jobs.lake import log as logs
from spark_jobs.lake import store as stores
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.failures import store_failure
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.places import StorePlace
from spark_jobs.lake.reading import open_table
from spark_jobs.lake.removal import delete_unneeded_files
from spark_jobs.lake.rewrite import rearrange
from spark_jobs.lake.tables import NAMES, ORDERS, Table
from spark_jobs.lake.writes import merge_orders
from spark_jobs.steps import Step

BIG = bytes(range(256)) * 4096 * 20  # 20 MiB: three parts of an upload


@pytest.fixture
def faults(store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A proxy to the store, which this process uses instead of it. Requests are repeated for 3 s."""
    monkeypatch.setattr(stores, "RETRY_SECONDS", 3.0)
    with misbehaving(store, seed=1) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint_url)
        yield made


@pytest.fixture
def place(faults: Faults) -> StorePlace:
    made = StorePlace(fresh_prefix())
    made.write("one", b"first")
    made.write("folder/two", b"second")
    return made


OPERATIONS: dict[str, Callable[[StorePlace, Path], Any]] = {
    "get": lambda place, _: place.read("one"),
    "list": lambda place, _: [found.name for found in place.list()],
    "head": lambda place, _: place.find("one"),
    "put": lambda place, _: place.write("one", b"first"),
    "delete": lambda place, _: place.delete(["one"]),
    "download": lambda place, folder: place.download("one", folder / "copy"),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.SERVER_ERROR, Fault.LOST_ANSWER])
def test_a_refusal_that_passes_is_not_noticed(faults: Faults, place: StorePlace, tmp_path: Path, fault: Fault, name: str) -> None:
    expected = OPERATIONS[name](place, tmp_path)
    faults.rule(fault, times=2)
    assert OPERATIONS[name](place, tmp_path) == expected
    assert faults.injected[fault] == 2


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [(Fault.SLOW_DOWN, "503 SlowDown"), (Fault.FORBIDDEN, "403 AccessDenied"), (Fault.EXPIRED, "403 ExpiredToken")],
)
def test_a_refusal_that_stays_is_one_line(
    faults: Faults, place: StorePlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, reason: str, name: str
) -> None:
    monkeypatch.setattr(stores, "RETRY_SECONDS", 0.3)
    stores._object_store.cache_clear()
    faults.rule(fault)
    with pytest.raises(StoreError) as raised:
        OPERATIONS[name](place, tmp_path)
    operation = {"download": "get"}.get(name, name)
    assert_plain(raised.value, rf"^{operation} s3://.* failed: [45]")
    if name not in ("head", "download"):  # the answer to a HEAD has no text
        assert reason in raised.value.message
        assert raised.value.retryable == (fault is not Fault.FORBIDDEN)
    assert "object-store.md" in str(raised.value)


def assert_plain(error: Exception, pattern: str) -> None:
    """The text of an error is a line for people, which says what failed, and has no secret."""
    text = str(error)
    assert re.search(pattern, text), text
    assert "\n" not in text and "\x1b" not in text and "<Error>" not in text and "Debug source" not in text, text
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text and os.environ["AWS_ACCESS_KEY_ID"] not in text, text


def test_a_missing_bucket_is_named(faults: Faults) -> None:
    with pytest.raises(StoreError, match=r"list s3://no-such-bucket/x failed: 404 NoSuchBucket") as raised:
        list(StorePlace("s3://no-such-bucket/x").list())
    assert not raised.value.retryable


def test_an_answer_that_is_cut_off_is_read_again(faults: Faults, place: StorePlace, tmp_path: Path) -> None:
    place.write("big", BIG)

    def download() -> bytes:
        place.download("big", tmp_path / "big")
        return (tmp_path / "big").read_bytes()

    readings: list[Callable[[], bytes]] = [
        lambda: place.read("big"),
        lambda: place.open("big").read(),  # by blocks of a buffered reader, which must not become a request each
        download,
    ]
    for read in readings:
        before = faults.requests["GET"]
        faults.rule(Fault.CUT, "GET", times=2)
        assert read() == BIG
        assert faults.requests["GET"] - before < 10
        faults.calm()
    faults.rule(Fault.CUT, LIST, times=1)
    assert [found.name for found in place.list()] == ["big", "folder/two", "one"]
    assert faults.injected[Fault.CUT] == 7
    faults.rule(Fault.CUT, "GET")
    with pytest.raises(StoreError, match=r"^get s3://.*/one failed: the answer was cut off"):
        place.read("one")


def test_a_put_whose_answer_is_lost(faults: Faults, place: StorePlace) -> None:
    """An unconditional put is repeated. A conditional one is refused as if somebody else had been faster: its caller reads."""
    faults.rule(Fault.LOST_ANSWER, "PUT", times=1)
    place.write("new", b"written")
    assert place.read("new") == b"written"
    faults.rule(Fault.LOST_ANSWER, "PUT", times=1)
    with pytest.raises(FileExistsError):
        place.create("created", b"mine")
    content, tag = place.read_tagged("created")
    assert content == b"mine"
    faults.rule(Fault.LOST_ANSWER, "PUT", times=1)
    assert place.swap("created", b"changed", tag) is None
    assert place.read("created") == b"changed"
    assert faults.injected[Fault.LOST_ANSWER] == 3


@pytest.mark.services
def test_an_upload_that_breaks_off_leaves_no_half_object(faults: Faults, place: StorePlace, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(BIG)
    place.write("replaced", b"old")
    faults.rule(Fault.SLOW_DOWN, "PUT", r"\?part=2$")
    for name in ("fresh", "replaced"):
        with pytest.raises(StoreError, match=rf"^put s3://.*/{name} failed: 503 SlowDown"):
            place.upload(source, name)
    faults.calm()
    assert place.find("fresh") is None
    assert place.read("replaced") == b"old"
    faults.rule(Fault.LOST_ANSWER, "PUT", r"\?part=", times=2)
    place.upload(source, "fresh")
    assert place.read("fresh") == BIG


def test_many_deletes_go_in_few_requests(faults: Faults, place: StorePlace) -> None:
    names = [f"many/{number}" for number in range(30)]
    for name in names:
        place.write(name, b"x")
    before = faults.requests["POST"] + faults.requests["DELETE"]
    faults.rule(Fault.SLOW_DOWN, "POST|DELETE", times=2)
    place.delete([*names, "many/missing"])
    assert list(place.list("many")) == []
    assert faults.requests["POST"] + faults.requests["DELETE"] - before <= 4


def created(*tables: Table, home: Path) -> Lake:
    """A lakehouse in the store with some tables of the registry."""
    lake = Lake(load_settings(home=home, lakehouse=fresh_prefix()))
    for table in tables:
        uri = lake.uri(table)
        DeltaTable.create(
            uri,
            Schema.from_arrow(table.schema),
            partition_by=list(table.partition_by),
            storage_options=stores.delta_options(uri),
        )
    return lake


def names(*ids: str) -> pa.Table:
    return pa.table({name: list(ids) for name in NAMES.schema.names}, schema=NAMES.schema)


def ids(lake: Lake) -> list[str]:
    """The ids of table names, with their repetitions, by Arrow; DuckDB must find the same."""
    found = sorted(lake.rows(NAMES, "id")["id"].to_pylist())
    with lake.database() as database:
        assert sorted(database.sql(f"select id from {lake.scan(NAMES)}").fetchall()) == [(one,) for one in found]
    return found


def added_twice(lake: Lake, table: Table) -> list[str]:
    """The data files that more than one commit added: who reads the log commit by commit would count their rows twice."""
    version = lake.version(table)
    assert version is not None
    commits = lake.log(table).commits(-1, version)
    assert commits is not None
    return [path for path, times in Counter(path for commit in commits for path in commit.added_paths).items() if times > 1]


@pytest.fixture
def lake(faults: Faults, tmp_path: Path) -> Lake:
    made = created(NAMES, home=tmp_path / "home")
    made.append(NAMES, names("a"), Step.NAMES)
    return made


def reads(lake: Lake) -> dict[str, Callable[[], object]]:
    return {
        "open": lambda: open_table(lake.uri(NAMES)).version(),
        "version": lambda: lake.version(NAMES),
        "commit": lambda: lake.log(NAMES).commits(-1, 1),
        "rows": lambda: lake.rows(NAMES, "id").num_rows,
        "duckdb": lambda: ids(lake),
    }


@pytest.mark.parametrize(
    "name", ["open", "rows", "duckdb", *(pytest.param(name, marks=pytest.mark.services) for name in ("version", "commit"))]
)
def test_reading_a_table_while_the_store_misbehaves(lake: Lake, faults: Faults, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Faults that pass are not noticed; those that stay are one line of the store, and no damage of the table."""
    monkeypatch.setattr(duck, "_HTTP_SETTINGS", {**duck._HTTP_SETTINGS, "http_retries": 3})
    read = reads(lake)[name]
    expected = read()
    logs._kept.clear()
    for fault in (Fault.SLOW_DOWN, Fault.LOST_ANSWER):
        faults.rule(fault, "GET|LIST", times=2)
        assert read() == expected
        faults.calm()
    if name != "duckdb":  # its extension does not repeat a cut reading of the log
        faults.rule(Fault.CUT, "GET", times=2)
        assert read() == expected
        faults.calm()
    for fault, reason in ((Fault.FORBIDDEN, "403 AccessDenied"), (Fault.CUT, "cut off")):
        logs._kept.clear()
        faults.rule(fault, "GET|LIST")
        with pytest.raises(StoreError, match=reason) as raised:
            read()
        assert_plain(raised.value, r"^(get|list) s3://lake/")
        faults.calm()
    assert read() == expected


def test_an_object_that_is_gone_is_damage_and_not_a_fault_of_the_store(lake: Lake) -> None:
    snapshot = lake.pin(NAMES)
    [path] = snapshot.paths(NAMES)
    StorePlace(lake.uri(NAMES)).delete([path])
    with pytest.raises(FileNotFoundError, match=rf"no such object: .*names/{path}"):
        snapshot.rows(NAMES)
    with (
        pytest.raises(TableCorruptionError, match=rf"cannot be read: get s3://.*{path} failed: 404") as raised,
        lake.database() as database,
    ):
        database.sql(f"select * from {snapshot.scan(NAMES)}").fetchall()
    assert_plain(raised.value, "fsck")


@pytest.mark.services
def test_a_list_that_lags_never_goes_back_and_changes_no_sum(lake: Lake, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read may be old, but not older than what this process has seen or written; a writer that sees an old version
    commits once the list has the newest one."""
    assert lake.version(NAMES) == 1
    time.sleep(3)  # a store dates objects in whole seconds
    began = time.time() - 1.5
    faults.rule(Fault.LAGGING_LIST, LIST, since=began)
    lake.append(NAMES, names("b"), Step.NAMES)
    assert lake.version(NAMES) == 2  # not in the list, but committed here
    with pytest.raises(StoreError, match=r"lacks _delta_log/0+2\.json, which is there") as raised:
        lake.rows(NAMES, "id")
    assert raised.value.retryable
    assert lake.version(NAMES) == 2  # not in the list, but seen before
    logs._own.clear()
    logs._listed.clear()  # another process, which knows nothing
    other = Lake(lake.settings)
    assert other.version(NAMES) == 1
    monkeypatch.setattr(commits, "_ATTEMPTS", 3)
    with pytest.raises(CommitFailedError):
        other.append(NAMES, names("c"), Step.NAMES)
    monkeypatch.undo()
    monkeypatch.setenv("AWS_ENDPOINT_URL", faults.endpoint_url)
    faults.calm()
    faults.rule(Fault.LAGGING_LIST, LIST, since=began, lasts=0.5)
    other.append(NAMES, names("c"), Step.NAMES)
    faults.calm()
    assert (ids(lake), added_twice(lake, NAMES)) == (["a", "b", "c"], [])


def test_a_table_that_was_created_again_is_not_taken_for_a_list_that_lags(lake: Lake) -> None:
    lake.append(NAMES, names("b"), Step.NAMES)
    assert lake.version(NAMES) == 2
    StorePlace(lake.uri(NAMES)).delete_folder("")
    assert Lake(lake.settings).version(NAMES) is None


def test_what_another_program_prints_about_a_store() -> None:
    get = "Error performing GET http://store/lake/t/_delta_log/_last_checkpoint in 2ms - HTTP error: request or response body error"
    found = store_failure(
        f"Runtime Error in model m\n  IO Error: DeltaKernel ObjectStoreError (8): Generic S3 error: {get}\n\nLINE 1"
    )
    assert found is not None and found.retryable
    assert found.message == "get s3://lake/t/_delta_log/_last_checkpoint failed: the answer was cut off"
    missing = "HTTP Error: HTTP GET error reading 's3://lake/t/a.parquet' in region 'x' (HTTP 404 Not Found)"
    for other in ("Binder Error: column x", "Got 3 results, configured to fail if != 0", missing):
        assert store_failure(other) is None


# --- commits of unknown outcome ---------------------------------------------------------------------------------------------------


def append(lake: Lake) -> None:
    lake.append(NAMES, names("b"), Step.NAMES)


def append_once(lake: Lake) -> None:
    lake.append(NAMES, names("b"), Step.NAMES, transaction=Transaction("query", 7))


def replace(lake: Lake) -> None:
    lake.replace(NAMES, names("a", "b"), Step.NAMES)


def correct(lake: Lake) -> None:
    """As a correction does: on the version that it was decided on, files out and others in."""
    with lake.writer(NAMES) as writer:
        writer.write(names("a", "b"))
    snapshot = lake.pin(NAMES)
    lake.commit(NAMES, Step.NAMES, base=snapshot.version(NAMES), remove=snapshot.files(NAMES), add=writer.files)


def correct_adding(lake: Lake) -> None:
    """As a correction does that only adds rows."""
    with lake.writer(NAMES) as writer:
        writer.write(names("b"))
    lake.commit(NAMES, Step.NAMES, base=lake.version(NAMES), add=writer.files, transaction=Transaction("run", 0))


COMMITS = [append, append_once, replace, correct, correct_adding]
LOST = {
    "lost": (Fault.LOST_ANSWER, 0.0),
    "too late": (Fault.SLOW_ANSWER, 2.0),
}


@pytest.mark.parametrize("how", ["lost", pytest.param("too late", marks=pytest.mark.services)])
@pytest.mark.parametrize("commit", COMMITS)
def test_a_commit_whose_answer_is_lost_counts_once(
    lake: Lake, faults: Faults, monkeypatch: pytest.MonkeyPatch, commit: Callable[[Lake], None], how: str
) -> None:
    """The commit takes effect, and the writer does not hear of it: it looks for it, and neither fails nor commits again."""
    monkeypatch.setattr(stores, "_ANSWER_SECONDS", 1)
    fault, seconds = LOST[how]
    faults.rule(fault, "PUT", r"/names/_delta_log/0+2\.json$", times=1, seconds=seconds)
    commit(lake)
    assert faults.injected[fault] == 1
    assert (ids(lake), added_twice(lake, NAMES)) == (["a", "b"], [])
    assert lake.version(NAMES) == 2
    lake.append(NAMES, names("c"), Step.NAMES)
    assert ids(lake) == ["a", "b", "c"]


@pytest.mark.services
def test_a_merge_a_compaction_and_a_vacuum_whose_answers_are_lost(faults: Faults, tmp_path: Path) -> None:
    lake = created(ORDERS, home=tmp_path / "home")
    for number in range(3):
        faults.rule(Fault.LOST_ANSWER, "PUT", r"_delta_log/\d+\.json$", times=1)
        merge_orders(orders("o-1", f"o-{number + 2}"), lake.settings, Transaction("query", number), {"n": number})
    merge_orders(orders("o-9"), lake.settings, Transaction("query", 2), {})  # seen
    assert (lake.version(ORDERS), added_twice(lake, ORDERS)) == (3, [])
    faults.rule(Fault.LOST_ANSWER, "PUT", r"_delta_log/\d+\.json$", times=1)
    rearrange(lake, ORDERS, 3, (), 10**8, "run")
    faults.rule(Fault.LOST_ANSWER, "PUT", r"_delta_log/\d+\.json$", times=2)
    delete_unneeded_files(lake, ORDERS, 0, [])
    assert faults.injected[Fault.LOST_ANSWER] >= 5
    assert sorted(lake.rows(ORDERS, "order_id")["order_id"].to_pylist()) == ["o-1", "o-2", "o-3", "o-4"]
    assert len(lake.pin(ORDERS).files(ORDERS)) == 1
    assert added_twice(lake, ORDERS) == []


def orders(*order_ids: str) -> pa.Table:
    rows = pa.table({"order_id": list(order_ids)})
    for field in ORDERS.schema:
        if field.name != "order_id":
            rows = rows.append_column(field, pa.nulls(len(order_ids), field.type))
    return rows.select(ORDERS.schema.names).cast(ORDERS.schema)


# --- credentials ------------------------------------------------------------------------------------------------------------------


@pytest.mark.services
def test_credentials_that_expire_are_renewed(lake: Lake, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table, a place and a database that are open for long read with the new ones."""
    given = tmp_path / "given"
    program = tmp_path / "credentials"
    program.write_text(f"#!/bin/sh\ncat {given}\n", "utf-8")
    program.chmod(0o700)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {program}\nregion = us-east-1\n", "utf-8")

    def give(seconds: float) -> None:
        found = {"Version": 1, "AccessKeyId": short_lived_access_key(seconds), "SecretAccessKey": "s", "SessionToken": "t"}
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        given.write_text(json.dumps({**found, "Expiration": until.isoformat()}), "utf-8")

    give(6)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    stores._session.cache_clear()
    try:
        place = StorePlace(lake.uri(NAMES))
        lake = Lake(lake.settings)  # has opened nothing with other credentials
        with lake.database() as database:
            count = f"select count(*) from {lake.scan(NAMES)}"
            for _ in range(2):
                lake.append(NAMES, names("b"), Step.NAMES)
                assert list(place.list("_delta_log"))
                lake.renew_credentials(database)
                rows = database.sql(count).fetchone()
                time.sleep(6.2)
                give(6)
            assert rows == (3,)
        assert faults.injected[Fault.EXPIRED] == 0
        give(-5)
        with pytest.raises(ConfigurationError, match="the credentials for s3:// cannot be had"):
            lake.version(NAMES)
    finally:
        stores._session.cache_clear()
