"""What the session decides by where the tasks run."""

from __future__ import annotations

import pytest

from spark_jobs.session import _of_a_cluster, is_one_machine


@pytest.mark.parametrize(
    ("master", "alone"),
    [("local", True), ("local[*]", True), ("local[2, 3]", True), ("local-cluster[2,1,1024]", False), ("yarn", False)],
)
def test_one_machine_or_more(master: str, alone: bool) -> None:
    assert is_one_machine(master) is alone


def test_the_driver_is_found_where_it_finds_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARK_LOCAL_IP", raising=False)
    assert _of_a_cluster("spark://127.0.0.1:7077,other:7077") == {"spark.driver.host": "127.0.0.1"}
    assert _of_a_cluster("spark://no.such.host.invalid:7077") == {}
    assert _of_a_cluster("k8s://https://127.0.0.1:6443") == {}
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.7")  # said already
    assert _of_a_cluster("spark://127.0.0.1:7077") == {}
