"""``adtally up``: what it refuses before anything starts, and what it writes for Dagster."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import terminal
from dagster._core.instance.config import PoolGranularity
from dagster._core.storage.tags import GRPC_INFO_TAG
from filelock import FileLock
from terminal import environment

from orchestration.up.code_server import settle_lost_runs
from orchestration.up.instance import POOLS, home_instance, initialize_pool_limits, write_instance_config
from orchestration.up.services import CODE, CONSOLE, INGEST, free_port, is_listening, process_environment, services, socket_path
from orchestration.up.up import END_SECONDS, Stop
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import MachineError, UsageError
from spark_jobs.lake.locks import UP
from tests.orchestration.up.deployment import Deployment, processes_of


@pytest.fixture
def fresh(tmp_path: Path) -> Settings:
    """Settings of a home that is not there yet."""
    return load_settings(home=tmp_path / "home")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody listens."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        yield holder.getsockname()[1]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


# Refused, with one line and nothing changed


@pytest.mark.parametrize(
    ("arguments", "changes", "status", "message"),
    [
        (
            [],
            {"ADTALLY_WEBSERVR_PORT": "3001"},
            2,
            "there is no setting ADTALLY_WEBSERVR_PORT (do you mean ADTALLY_WEBSERVER_PORT?)",
        ),
        ([], {"ADTALLY_WEBSERVER_PORT": "many"}, 2, "ADTALLY_WEBSERVER_PORT: "),
        (["--port", "65536"], {}, 2, "(see `adtally up --help`)"),
        (["--trigger", "soon"], {}, 2, "--trigger 'soon' is not a time above 0"),
        (["--port", "0"], {"JAVA_HOME": "/nonexistent"}, 2, "JAVA_HOME is /nonexistent, where no Java is"),
    ],
    ids=["unknown setting", "wrong setting", "no such port", "trigger", "no Java"],
)
def test_wrong_use_is_one_line_before_anything_starts(
    tmp_path: Path, arguments: list[str], changes: dict[str, str], status: int, message: str
) -> None:
    done = terminal.run("--home", "home", "up", *arguments, cwd=tmp_path, env=environment(**changes))
    assert done.status == status
    assert message in done.error
    assert names(tmp_path / "home") <= {UP.file}


def test_a_port_that_is_taken_is_said_before_anything_starts(tmp_path: Path, taken: int) -> None:
    done = terminal.run("--home", "home", "up", "--port", str(taken), cwd=tmp_path)
    assert done.status == 2
    assert done.error == (
        f"port {taken} of 127.0.0.1 cannot be had: Address already in use (name another with --port; 0 takes a free one)"
    )
    assert names(tmp_path / "home") == {UP.file}


def test_a_second_one_on_the_same_home_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with FileLock(home / UP.file):
        done = terminal.run("--home", "home", "up", "--port", "0", cwd=tmp_path)
    assert done.status == 1
    assert done.error == f"adtally up runs on {home} already (stop it, or name another --home)"
    assert names(home) == {UP.file}


def test_any_free_port_will_do(taken: int) -> None:
    assert free_port(0) not in (0, taken)
    with pytest.raises(UsageError):
        free_port(taken)


# What is started


def test_the_definitions_are_loaded_by_the_code_server_only(fresh: Settings) -> None:
    fresh.dagster_path.mkdir(parents=True)
    same: dict[str, Any] = {"port": 3000, "console_port": 3001, "code_socket": Path("/tmp/code.sock"), "tell": lambda *_: None}
    found = services(fresh, {}, trigger_seconds=2.5, ingest=True, **same)
    assert [name for name, service in found.items() if "orchestration.up.code_server" in service.command] == [CODE]
    assert not [name for name, service in found.items() if "orchestration.definitions" in service.command]
    assert found[INGEST].command[-4:] == ("--wait", "--continuous", "--trigger", "2.5")
    assert found[CONSOLE].command[-3:] == ("console", "--port", "3001")
    written = (fresh.dagster_path / "workspace.yaml").read_text()
    assert written == "load_from:\n  - grpc_server:\n      socket: /tmp/code.sock\n      location_name: adtally\n"
    default = services(fresh, {}, trigger_seconds=None, ingest=True, **same)
    assert default[INGEST].command[-2:] == ("--wait", "--continuous")
    without = services(fresh, {}, trigger_seconds=5, ingest=False, **same)
    assert found.keys() - without.keys() == {INGEST}


def test_the_processes_know_the_home_whatever_folder_they_are_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = process_environment(load_settings(home=Path("home")), "http://127.0.0.1:3000", "http://127.0.0.1:3001")
    assert made["ADTALLY_HOME"] == str(tmp_path / "home")
    assert made["DAGSTER_HOME"] == str(tmp_path / "home" / "dagster")
    assert made["DAGSTER_DISABLE_TELEMETRY"] == "yes"
    assert made["ADTALLY_WEBSERVER_URL"] == "http://127.0.0.1:3000"
    assert made["ADTALLY_REPORTS_URL"] == "http://127.0.0.1:3001"


def test_the_socket_is_short_and_of_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(tempfile.mkdtemp(prefix="up-"))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    deep = load_settings(home=tmp_path / ("deep" * 40))
    path = socket_path(deep)
    assert path == socket_path(deep) != socket_path(load_settings(home=tmp_path))
    assert len(str(path)) < 100
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not is_listening(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)
        assert is_listening(path)
    assert not is_listening(path)  # the file is still there
    path.parent.chmod(0o755)
    with pytest.raises(MachineError, match="is not a folder of this user alone"):
        socket_path(deep)


# The end


def test_the_end_hurries_when_it_is_asked_for_twice_or_takes_too_long() -> None:
    now = 100.0
    stop = Stop(clock=lambda: now)
    with stop.listening():
        assert not stop.hurry()
        signal.raise_signal(signal.SIGINT)
        assert stop.asked.is_set()
        assert not stop.hurry()
        now += END_SECONDS
        assert stop.hurry()
    with Stop(clock=lambda: now).listening() as twice:
        signal.raise_signal(signal.SIGTERM)
        assert not twice.hurry()
        signal.raise_signal(signal.SIGTERM)
        assert twice.hurry()


def test_a_start_ends_within_ten_seconds(tmp_path: Path) -> None:
    """The code server is loading the definitions: it answers nobody yet."""
    home = tmp_path / "home"
    with Deployment(home, "--no-ingest") as up:
        up.wait_for("the code server starts", lambda: bool(up.said("code-server  starting")), seconds=120)
        began = time.monotonic()
        assert up.end(seconds=60) == 0, up.report("exit status")
        seconds = time.monotonic() - began
        assert processes_of(home) == []
    assert up.said("ending, within 10 s; Ctrl-C again ends it at once")
    print(f"ended in {seconds:.1f} s")
    assert seconds < END_SECONDS + 8  # the rest is for a machine that does other things as well


# The instance


def test_the_instance_is_configured_as_the_lakehouse_needs_it(fresh: Settings) -> None:
    with home_instance(fresh) as instance:
        config = instance.get_concurrency_config()
        assert config.pool_config.pool_granularity == PoolGranularity.RUN
        assert config.pool_config.default_pool_limit == 1
        assert config.run_queue_config is not None and config.run_queue_config.max_concurrent_runs == 3
        assert not instance.telemetry_enabled
        assert instance.run_monitoring_enabled and instance.run_retries_enabled
        assert not instance.run_retries_retry_on_asset_or_op_failure
        assert instance.freshness_enabled
    assert {"dagster.yaml", "history"} <= names(fresh.dagster_path)


def test_a_home_that_is_moved_keeps_its_runs(fresh: Settings, tmp_path: Path) -> None:
    @dg.op
    def nothing() -> None: ...

    @dg.job
    def job() -> None:
        nothing()

    with home_instance(fresh) as instance:
        run_id = job.execute_in_process(instance=instance).run_id
    fresh.home_path.rename(tmp_path / "moved")
    with home_instance(load_settings(home=tmp_path / "moved")) as instance:
        assert instance.get_run_by_id(run_id) is not None
    assert not fresh.home_path.exists()


def test_a_configuration_that_was_changed_is_kept(fresh: Settings) -> None:
    path = write_instance_config(fresh)
    path.write_text(path.read_text().replace("max_concurrent_runs: 3", "max_concurrent_runs: 9"))
    before = path.read_text()
    assert write_instance_config(fresh).read_text() == before
    with home_instance(fresh) as instance:
        queue = instance.get_concurrency_config().run_queue_config
        assert queue is not None and queue.max_concurrent_runs == 9
    assert [name for name in names(fresh.dagster_path) if name.startswith(".dagster.yaml")] == []


def test_dagsters_queue_knows_the_limit_of_each_pool_from_the_start(fresh: Settings) -> None:
    with home_instance(fresh) as instance:
        assert instance.event_log_storage.get_concurrency_keys() == set()
        initialize_pool_limits(instance)
        initialize_pool_limits(instance)
        assert instance.event_log_storage.get_concurrency_keys() == set(POOLS)
        assert {limit.limit for limit in instance.event_log_storage.get_pool_limits()} == {1}
    path = write_instance_config(fresh)
    path.write_text(path.read_text().replace("default_limit: 1", "default_limit: 2"))
    with home_instance(fresh) as instance:
        initialize_pool_limits(instance)
        assert {limit.limit for limit in instance.event_log_storage.get_pool_limits()} == {2}


# Runs whose adtally up was killed


def test_lost_runs_are_settled_once_and_others_are_left_alone(fresh: Settings) -> None:
    mine, others = "/tmp/mine.sock", "/tmp/others.sock"
    with home_instance(fresh) as instance:

        def run(status: dg.DagsterRunStatus, socket_name: str | None) -> str:
            tags = {GRPC_INFO_TAG: json.dumps({"host": "localhost", "socket": socket_name})} if socket_name else {}
            run_id = os.urandom(16).hex()
            instance.add_run(dg.DagsterRun(job_name="job", run_id=run_id, status=status, tags=tags))
            return run_id

        started = run(dg.DagsterRunStatus.STARTED, mine)
        starting = run(dg.DagsterRunStatus.STARTING, mine)
        canceling = run(dg.DagsterRunStatus.CANCELING, mine)
        left_alone = {
            run(dg.DagsterRunStatus.STARTED, others): dg.DagsterRunStatus.STARTED,  # of `dagster dev`
            run(dg.DagsterRunStatus.STARTED, None): dg.DagsterRunStatus.STARTED,  # of `adtally demo`
            run(dg.DagsterRunStatus.SUCCESS, mine): dg.DagsterRunStatus.SUCCESS,
        }
        assert set(settle_lost_runs(instance, mine)) == {started, starting, canceling}
        assert settle_lost_runs(instance, mine) == []

        def status(run_id: str) -> dg.DagsterRunStatus:
            found = instance.get_run_by_id(run_id)
            assert found is not None
            return found.status

        assert status(started) == status(starting) == dg.DagsterRunStatus.FAILURE
        assert status(canceling) == dg.DagsterRunStatus.CANCELED
        assert {run_id: status(run_id) for run_id in left_alone} == left_alone
