"""What the session decides by where the tasks run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyspark
import pytest

from spark_jobs.session import _cluster_options, _java_option, _launcher_options, _local_folder, is_one_machine


@pytest.mark.parametrize(
    ("master", "alone"),
    [("local", True), ("local[*]", True), ("local[2, 3]", True), ("local-cluster[2,1,1024]", False), ("yarn", False)],
)
def test_one_machine_or_more(master: str, alone: bool) -> None:
    assert is_one_machine(master) is alone


def test_the_driver_is_found_where_it_finds_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARK_LOCAL_IP", raising=False)
    assert _cluster_options("spark://127.0.0.1:7077,other:7077") == {"spark.driver.host": "127.0.0.1"}
    assert _cluster_options("spark://no.such.host.invalid:7077") == {}
    assert _cluster_options("k8s://https://127.0.0.1:6443") == {}
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.7")  # said already
    assert _cluster_options("spark://127.0.0.1:7077") == {}


@pytest.mark.parametrize(
    ("value", "option"),
    [("/a/b-1", "/a/b-1"), ("/my ads", '"/my ads"'), ("/O'Brien", '"/O\'Brien"'), ('/a"b', '"/a\\"b"'), ("/a$b", '"/a$b"')],
)
def test_an_option_of_java_is_quoted_where_spark_would_cut_it(value: str, option: str) -> None:
    assert _java_option(value) == option


def test_sparks_own_folder_has_no_comma_in_its_path() -> None:
    assert _local_folder(Path("/my ads/scratch")) == Path("/my ads/scratch/spark")
    elsewhere = [_local_folder(Path("/a,b/scratch")) for _ in range(2)]
    assert len(set(elsewhere)) == 2 and not any("," in str(folder) for folder in elsewhere)  # nobody can guess the next
    assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in elsewhere)


@pytest.mark.parametrize(("folder", "added"), [("spark", True), ("my spark", False)])
def test_the_launcher_is_given_its_own_jar(folder: str, added: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not if its path has a blank, at which Spark's script would cut the option."""
    jar = tmp_path / folder / "jars" / "spark-launcher_2.13-4.2.0.jar"
    jar.parent.mkdir(parents=True)
    jar.touch()
    monkeypatch.setattr(pyspark, "__file__", str(tmp_path / folder / "__init__.py"))
    assert (f"-Xbootclasspath/a:{jar}" in _launcher_options().split()) == added
    assert all(option.startswith("-X") for option in _launcher_options().split())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize(("chosen", "threads"), [(None, 1), ("3", 3)])
def test_numpy_starts_no_threads_unless_the_environment_says_so(chosen: str | None, threads: int) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    environment |= {} if chosen is None else {"OPENBLAS_NUM_THREADS": chosen}
    told = subprocess.run(
        [sys.executable, "-c", "import os, spark_jobs, numpy; print(len(os.listdir('/proc/self/task')))"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(told.stdout) == min(threads, os.cpu_count() or 1)
