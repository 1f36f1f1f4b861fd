"""PyFlink's own environment, made once under the work folder: it cannot share one with Spark.

The package brings Flink itself and the JSON format. Two things it lacks: the Parquet format, a jar resolved with
Spark's resolver and checked against its SHA-256; and Hadoop's classes, which that format needs and PySpark ships.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

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
    """The interpreter of the Flink environment; installs it when it is not there. Needs the network the first time."""
    venv = work / "flink-venv"
    python = venv / "bin" / "python"
    if (venv / ".complete").exists():
        return python
    if shutil.which("uv"):
        _run(["uv", "venv", "--clear", "--python", "3.11", str(venv)])
        _run(["uv", "pip", "install", "-p", str(python), f"apache-flink=={FLINK}"])
    else:
        _run([sys.executable, "-m", "venv", "--clear", str(venv)])
        _run([str(python), "-m", "pip", "install", "-q", f"apache-flink=={FLINK}"])
    (venv / ".complete").touch()
    return python


def parquet_jar(work: Path) -> Path:
    """Flink's Parquet format, resolved once and checked."""
    jar = work / f"flink-sql-parquet-{FLINK}.jar"
    if not jar.exists():
        ivy = work / "ivy"
        _run([sys.executable, "-c", _RESOLVE, PARQUET_COORDINATES, str(ivy)])
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


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)[:200]} failed:\n{(done.stdout + done.stderr)[-1500:]}")
