"""The daemon that forks Spark's Python workers: what they import, and what they do with the memory that they free."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyspark
import pytest
from pyspark.sql import SparkSession

from spark_jobs.python_daemon import without_packed_pyspark


def test_workers_import_the_installed_files_of_pyspark(spark: SparkSession) -> None:
    (found,) = spark.sparkContext.parallelize([0], 1).map(lambda _: __import__("pyspark").__file__).collect()
    assert Path(str(found)).samefile(str(pyspark.__file__))  # not the copy in Spark's ZIP file


@pytest.mark.parametrize("linked", [False, True])
def test_only_the_zip_files_of_an_installed_pyspark_are_left_out(tmp_path: Path, linked: bool) -> None:
    packed = tmp_path / "site" / "pyspark" / "python" / "lib"
    packed.mkdir(parents=True)
    site = tmp_path / "site"
    if linked:
        site = tmp_path / "link"
        site.symlink_to(tmp_path / "site")
    zips = [str(packed / "pyspark.zip"), str(packed / "py4j-src.zip")]
    distribution = [
        "/opt/spark/python/lib/pyspark.zip",
        "/opt/spark/python/lib/py4j-src.zip",
    ]  # of a cluster that has no installed one
    assert without_packed_pyspark([*zips, "/job", *distribution, str(site)]) == ["/job", *distribution, str(site)]
    assert without_packed_pyspark([*zips, "/job"]) == [*zips, "/job"]


def _faults_of_later_rounds(_numbers: Iterable[int]) -> list[int]:
    """Take and free the memory of a chunk several times; return the page faults of each round but the first two."""
    faults = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        columns = [np.ones(24 * 1024 * 1024, dtype=np.uint8) for _ in range(6)]
        del columns
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return faults[2:]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_workers_keep_the_memory_that_a_chunk_frees(spark: SparkSession) -> None:
    faults = spark.sparkContext.parallelize([0], 1).mapPartitions(_faults_of_later_rounds).collect()
    assert len(faults) == 3 and max(faults) < 1000  # 36,864 pages are used in a round
