"""What the session decides by where the tasks run."""

from __future__ import annotations

from pathlib import Path

import pytest

from spark_jobs.session import _cluster_options, _java_option, _local_folder, is_one_machine


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
