"""``adtally services``: what it says where nothing runs, and its errors. With a real Kafka and S3 under the marker ``services``."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from orchestration.cli.app import run
from services.launcher import s3
from services.launcher.processes import find
from spark_jobs.java import require_java


@pytest.mark.parametrize("service", ["kafka", "pinot", "s3"])
def test_what_never_ran_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], service: str) -> None:
    home = tmp_path / "home"
    assert run(["--home", str(home), "services", service, "status"]) == 1
    assert capsys.readouterr().out.startswith(f"{service} ")
    assert run(["--home", str(home), "services", service, "status", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["service"], found["running"], found["problem"], found["processes"]) == (service, False, None, {})
    assert run(["--home", str(home), "services", service, "down"]) == 0
    assert capsys.readouterr().out == f"{service} did not run\n"
    assert not home.exists()  # to ask makes nothing


@pytest.mark.parametrize("heap", ["0m", "5x", "512", "-1g", ""])
def test_a_heap_that_is_no_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], heap: str) -> None:
    assert run(["--home", str(tmp_path), "services", "pinot", "up", f"--heap={heap}"]) == 2
    assert "is not a size (as in 512m or 2g)" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--port=0", "--port=65536", "--partitions=0"])
def test_numbers_out_of_range_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert run(["--home", str(tmp_path), "services", "kafka", "up", option]) == 2
    assert "Input should be" in capsys.readouterr().err


def test_a_machine_without_java_is_told_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "none"))
    require_java.cache_clear()
    try:
        assert run(["--home", str(tmp_path), "services", "kafka", "up"]) == 2
    finally:
        require_java.cache_clear()
    said = capsys.readouterr().err
    assert "where no Java is" in said and "apt-get install" in said and said.count("\n") == 1


def test_a_machine_without_the_object_store_is_told_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PACKAGE", "adtally-has-no-such-package")
    assert run(["--home", str(tmp_path), "services", "s3", "up"]) == 2
    said = capsys.readouterr().err
    assert "is not installed" in said and "uv pip install" in said and said.count("\n") == 1


def test_a_state_that_cannot_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "services" / "kafka"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{", "utf-8")
    assert run(["--home", str(tmp_path), "services", "kafka", "status"]) == 1
    said = capsys.readouterr().err
    assert "state.json cannot be read" in said and said.count("\n") == 1


@pytest.mark.services
def test_kafka_up_status_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--home", str(tmp_path), "services", "kafka"]
    try:
        assert run([*command, "up", "--heap", "512m", "--partitions", "1"]) == 0
        said = capsys.readouterr()
        assert "starting kafka" in said.err and "bootstrap servers: 127.0.0.1:" in said.out
        assert 'bootstrap_servers = "127.0.0.1:' in (tmp_path / "kafka.toml").read_text()
        assert run([*command, "status", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["running"] and set(found["holds"].values()) == {1}
        assert run([*command, "up"]) == 0
        assert "kafka runs already" in capsys.readouterr().err
        assert run([*command, "up", "--fresh"]) == 2
        assert run([*command, "down", "--json"]) == 0
        assert not psutil.pid_exists(found["processes"]["kafka"])
    finally:
        for process in find(tmp_path / "services" / "kafka", "kafka"):
            process.kill()


@pytest.mark.services
def test_s3_up_status_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--home", str(tmp_path), "services", "s3"]
    path = tmp_path / "services" / "s3" / "s3.env"
    try:
        assert run([*command, "up"]) == 0
        said = capsys.readouterr()
        assert "made bucket lake" in said.err and f"AWS_ALLOW_HTTP are in {path}" in said.err
        assert "endpoint url: http://127.0.0.1:" in said.out
        secret = dict(line.split("=", 1) for line in path.read_text("utf-8").splitlines())["AWS_SECRET_ACCESS_KEY"]
        assert run([*command, "status", "--json"]) == 0
        shown = capsys.readouterr().out
        found = json.loads(shown)
        assert found["running"] and found["addresses"]["environment_file"] == str(path)
        assert secret not in said.out + said.err + shown
        assert run([*command, "up"]) == 0
        assert "s3 runs already" in capsys.readouterr().err
        assert run([*command, "up", "--fresh"]) == 2
        assert run([*command, "down", "--json"]) == 0
        assert not psutil.pid_exists(found["processes"]["s3"])
    finally:
        for process in find(tmp_path / "services" / "s3", "s3"):
            process.kill()
