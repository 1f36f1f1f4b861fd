"""PyFlink's own environment (`environments`).

The package brings Flink itself and the JSON format. Two things it lacks: the Parquet format, a jar resolved with
Spark's resolver and checked against its SHA-256; and Hadoop's classes, which that format needs and PySpark ships.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

from benchmarks.environments import environment, run_command
from benchmarks.measure import BenchmarkError

FLINK = "2.3.0"
PARQUET_COORDINATES = f"org.apache.flink:flink-sql-parquet:{FLINK}"
PARQUET_SHA256 = "f30617f4a5a6d437750f155ff72178ab34439aec91df64d96621c260559ba5fd"
HEAP = "4g"
_RESOLVE = """
import sys
from pyspark.sql import SparkSession
conf = {"spark.jars.packages": sys.argv[1], "spark.jars.ivy": sys.argv[2], "spark.ui.enabled": "false"}
builder = SparkSession.builder.master("local[1]")
for name, value in conf.items():
    builder = builder.config(name, value)
builder.getOrCreate().stop()
"""


def flink_python(work: Path) -> Path:
    """Return the interpreter of the Flink environment. Needs the network the first time."""
    return environment(work / "flink-venv", [f"apache-flink=={FLINK}"])


def parquet_jar(work: Path) -> Path:
    """Flink's Parquet format, resolved once and checked."""
    jar = work / f"flink-sql-parquet-{FLINK}.jar"
    if not jar.exists():
        ivy = work / "ivy"
        run_command([sys.executable, "-c", _RESOLVE, PARQUET_COORDINATES, str(ivy)])
        shutil.copyfile(ivy / "jars" / f"org.apache.flink_flink-sql-parquet-{FLINK}.jar", jar)
    found = hashlib.sha256(jar.read_bytes()).hexdigest()
    if found != PARQUET_SHA256:
        jar.unlink()
        raise BenchmarkError(f"{jar.name} has SHA-256 {found}, pinned is {PARQUET_SHA256}")
    return jar


def flink_environment(work: Path) -> dict[str, str]:
    """Environment variables of the Flink process: Parquet and Hadoop on the class path, the heap."""
    import pyspark

    hadoop = sorted((Path(pyspark.__file__).parent / "jars").glob("hadoop-client-*.jar"))
    if not hadoop:
        raise BenchmarkError("PySpark's Hadoop jars are missing, and Flink's Parquet format needs them")
    own = ("PYTHONPATH", "VIRTUAL_ENV", "SPARK_HOME", "FLINK_CONF_DIR")
    env = {k: v for k, v in os.environ.items() if k not in own}
    return env | {
        "HADOOP_CLASSPATH": os.pathsep.join(map(str, [parquet_jar(work), *hadoop])),
        "JVM_ARGS": f"-Xmx{HEAP}",
        "FLINK_LOG_DIR": str(work / "logs"),
    }
