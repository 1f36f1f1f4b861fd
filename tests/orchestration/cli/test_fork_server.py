"""The Java of the fork server: what a killed process leaves in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration.cli.fork_server import _Java

pytestmark = pytest.mark.homes

_MAKE_SPARK = """
from pyspark import SparkConf, SparkContext

SparkContext(conf=SparkConf().setMaster("local[1]").setAppName("killed"))
"""


@pytest.fixture
def java(tmp_path: Path) -> Iterator[_Java]:
    made = _Java(tmp_path / "java.log")
    yield made
    made.end()


def test_a_spark_that_java_makes_for_a_killed_process_is_stopped(java: _Java) -> None:
    command, environment = [sys.executable, "-c", _MAKE_SPARK], os.environ | java.environment()
    maker = subprocess.Popen(command, env=environment)
    while not java.makes_spark():
        assert maker.poll() is None
    maker.kill()
    maker.wait()
    java.stop_spark()
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr  # Java refuses a second Spark beside one that is left
