"""Published marts of a lakehouse in a real object store: other machines see whole builds, whoever is killed when."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import pytest
from terminal import ROOT, environment

from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import BusyError, StoreError
from spark_jobs.lake import marts as lake_marts
from spark_jobs.lake import store as object_store
from spark_jobs.lake.duck import connect_delta
from spark_jobs.lake.marts import KEPT_AFTER, CurrentMarts, current_marts, publish_marts, readable_marts
from spark_jobs.lake.places import StorePlace
from spark_jobs.steps import CRASH_VARIABLE

NOW = datetime(2026, 3, 12, 8, 0, tzinfo=UTC)
TABLES = ("fct_a", "fct_b")


@pytest.fixture
def machines(prefix: str, tmp_path: Path) -> tuple[Settings, Settings]:
    """Two homes of one lakehouse."""
    return load_settings(home=tmp_path / "one", lakehouse=prefix), load_settings(home=tmp_path / "two", lakehouse=prefix)


def build(settings: Settings, number: int, *, replaces: CurrentMarts | None = None, rows: int = 1000) -> None:
    """Publish a build whose tables have its number in every row."""
    folder = settings.marts_path.parent / ".build-test"
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "marts.duckdb"
    new.unlink(missing_ok=True)
    with duckdb.connect(str(new)) as connection:
        for name in TABLES:
            connection.execute(f"create table {name} as select {number} as build, range as row from range({rows})")

    def export(folder: Path) -> Iterable[Path]:
        for name in TABLES:
            path = folder / f"{name}.parquet"
            with duckdb.connect(str(new), read_only=True) as connection:
                connection.execute(f"copy {name} to '{path}' (format parquet)")
            yield path

    found = current_marts(settings) if replaces is None else replaces
    publish_marts(settings, new, build_id=f"build-{number}", built_at=NOW, replaces=found, export=export)


def seen(settings: Settings, path: Path | None = None) -> int:
    """The number of the build that a reader of a home sees; fails unless every row of every table is of it."""
    path = readable_marts(settings) if path is None else path
    assert path is not None
    with duckdb.connect(":memory:") as connection:
        connection.execute(f"attach '{path}' as marts (read_only)")
        builds = connection.execute(
            " union ".join(f"select build, count(*) from marts.{name} group by build" for name in TABLES)
        ).fetchall()
    assert len(builds) == 1, builds
    return int(builds[0][0])


def now(settings: Settings) -> int:
    return seen(settings, current_marts(settings).path)


def objects(settings: Settings) -> list[str]:
    return [found.name for found in StorePlace(f"{settings.state_uri}/marts").list()]


def change_pointer(settings: Settings, **changes: object) -> None:
    place = StorePlace(f"{settings.state_uri}/marts")
    place.write("current.json", json.dumps({**json.loads(place.read("current.json")), **changes}).encode())


def kill_a_build(settings: Settings, store: dict[str, str], number: int, point: str) -> None:
    """Run a build in a process that dies at a point."""
    program = f"from tests.spark_jobs.lake.test_marts import build, load_settings\nbuild(load_settings(), {number})"
    home = {"ADTALLY_HOME": str(settings.home_path), "ADTALLY_LAKEHOUSE": settings.lakehouse_uri}
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(**store, **home, **path, **{CRASH_VARIABLE: point}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_another_machine_sees_each_build(machines: tuple[Settings, Settings]) -> None:
    one, two = machines
    assert current_marts(one) == CurrentMarts(None) == current_marts(two)
    build(one, 1)
    assert (now(one), now(two)) == (1, 1)
    copy = two.marts_path.stat().st_ino
    assert now(two) == 1 and two.marts_path.stat().st_ino == copy, "downloaded once"
    build(two, 2)
    assert (now(one), now(two)) == (2, 2)
    assert {path.name for path in two.marts_path.parent.iterdir()} >= {"marts.duckdb", ".copy.json"}
    assert not (two.marts_path.parent / ".download").exists()


def test_parquet_files_beside_the_file_have_the_same_rows(machines: tuple[Settings, Settings]) -> None:
    one, _ = machines
    build(one, 1)
    assert objects(one) == [*(f"build-1/{name}.parquet" for name in TABLES), "build-1/marts.duckdb", "current.json"]
    with connect_delta(lakehouse=one.lakehouse_uri) as connection:
        found = connection.execute(f"select build, count(*) from '{one.state_uri}/marts/build-1/fct_a.parquet' group by 1")
        assert found.fetchall() == [(1, 1000)]


@pytest.mark.parametrize(("point", "after"), [("before:marts:0", 1), ("after:marts:0", 2)])
def test_killed_before_or_after_the_pointer_names_the_build(
    machines: tuple[Settings, Settings], store: dict[str, str], point: str, after: int
) -> None:
    one, two = machines
    build(one, 1)
    assert now(two) == 1
    kill_a_build(one, store, 2, point)
    assert (now(two), now(one)) == (after, after)
    assert any(name.startswith("build-2/") for name in objects(one))
    build(two, 3)
    assert (now(one), now(two)) == (3, 3)
    left = {name.partition("/")[0] for name in objects(one)}
    assert left == {"current.json", "build-1", "build-3"} | ({"build-2"} if after == 2 else set())


def test_a_build_that_another_one_overtook_is_not_published(machines: tuple[Settings, Settings]) -> None:
    one, two = machines
    build(one, 1)
    for before in (current_marts(one), CurrentMarts(None)):
        with pytest.raises(BusyError, match="published meanwhile"):
            if now(two) == 1:
                build(two, 2)
            build(one, 9, replaces=before)
        assert (now(one), now(two)) == (2, 2)


def test_a_build_is_kept_for_an_hour_after_it_was_replaced(machines: tuple[Settings, Settings]) -> None:
    one, _ = machines
    for number in (1, 2, 3):
        build(one, number)
    ended = datetime.now(UTC) - KEPT_AFTER
    long_ago, lately = (f"{at:%Y-%m-%dT%H:%M:%SZ}" for at in (ended, ended + timedelta(minutes=5)))
    change_pointer(one, replaced={"build-1": long_ago, "build-2": lately})
    build(one, 4)
    assert {name.partition("/")[0] for name in objects(one)} == {"current.json", "build-2", "build-3", "build-4"}


def test_a_copy_is_checked_before_it_is_read(machines: tuple[Settings, Settings]) -> None:
    one, two = machines
    build(one, 1)
    assert now(two) == 1
    build(one, 2)
    place = StorePlace(f"{one.state_uri}/marts")
    whole = place.read("build-2/marts.duckdb")
    place.write("build-2/marts.duckdb", whole[:20_000] + bytes(255 - byte for byte in whole[20_000:20_100]) + whole[20_100:])
    with pytest.raises(StoreError, match=r"get .*build-2/marts.duckdb failed: the content differs"):
        current_marts(two)
    assert seen(two, two.marts_path) == 1
    place.write("build-2/marts.duckdb", whole)
    assert now(two) == 2


def test_a_file_of_another_lakehouse_or_a_changed_one_is_not_read(machines: tuple[Settings, Settings], prefix: str) -> None:
    one, two = machines
    build(one, 1)
    build(other := load_settings(home=two.home_path, lakehouse=f"{prefix}-other"), 7)
    assert now(other) == 7
    assert (now(two), now(other)) == (1, 7)
    with duckdb.connect(str(two.marts_path)) as connection:
        connection.execute("update fct_a set build = 0")
    assert now(two) == 1
    assert current_marts(load_settings(home=two.home_path, lakehouse=f"{prefix}-empty")) == CurrentMarts(None)


def test_without_the_store_readers_get_the_last_copy_and_a_warning(
    machines: tuple[Settings, Settings], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = machines
    build(one, 1)
    assert now(one) == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(object_store, "_MOST_RETRIES", 0)
    with pytest.raises(StoreError, match=r"get .*current.json failed"):
        current_marts(one)
    with caplog.at_level(logging.WARNING, "adtally"):
        assert (seen(one), seen(one)) == (1, 1)
    [said] = [record.getMessage() for record in caplog.records]
    assert "the marts are this machine's last copy, which may be old" in said
    with pytest.raises(StoreError, match=r"get .*current.json failed"):
        readable_marts(two)


def test_a_deleted_build_is_looked_for_again(machines: tuple[Settings, Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that was slower than an hour: the build of its pointer is gone, and the pointer names another one."""
    one, two = machines
    build(one, 1)
    download, tries = lake_marts._download, []

    def slow(*arguments: object) -> Path:
        tries.append(1)
        if len(tries) == 1:
            build(one, 2)
            StorePlace(f"{one.state_uri}/marts").delete_folder("build-1")
        return download(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(lake_marts, "_download", slow)
    assert (now(two), len(tries)) == (2, 2)


def _read_until(settings: Settings, ends: float, builds: multiprocessing.Queue[list[int] | str]) -> None:
    found = []
    try:
        while time.time() < ends:
            found.append(now(settings))
        builds.put(found)
    except BaseException as error:
        builds.put(repr(error))


def test_readers_see_whole_builds_while_machines_build_and_are_killed(
    machines: tuple[Settings, Settings], store: dict[str, str]
) -> None:
    one, two = machines
    build(one, 1, rows=200_000)
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[list[int] | str] = context.Queue()
    ends = time.time() + 12
    readers = [context.Process(target=_read_until, args=(two, ends, queue)) for _ in range(2)]
    for reader in readers:
        reader.start()
    number = 1
    killer = threading.Thread(target=kill_a_build, args=(one, store, 1_000_000, "before:marts:0"))
    killer.start()
    killer.join()
    while time.time() < ends - 1:
        number += 1
        build(one, number, rows=200_000)
    results = [queue.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join(30)
    for found in results:
        assert isinstance(found, list), found
        assert found and found == sorted(found) and found[-1] <= number, found
    assert now(two) == number
