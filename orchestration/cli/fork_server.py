"""Runs ``adtally`` commands as processes that are forked from one that has imported everything.

`adtally chaos` starts thousands of commands. Each is a real process with its own environment, which can be killed at any moment,
but costs no imports. An ingest connects to a Java that already runs, as under spark-submit; if the ingest is killed, its Spark
is stopped before the next one begins.

A request is a JSON line on standard input: ``{"start": NAME, "arguments": [...], "environment": {...}, "output": PATH}``. The
answers are JSON lines on standard output: ``{"started": NAME, "pid": PID}``, and at the end of the process ``{"ended": NAME,
"status": STATUS, "cpu_seconds": SECONDS}``. The server ends when its standard input is closed.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from py4j.java_gateway import JavaGateway  # type: ignore[import-untyped]
from pyspark import SparkConf, SparkContext
from pyspark.java_gateway import launch_gateway

from orchestration.cli.app import run
from spark_jobs.class_archive import class_archive
from spark_jobs.config import Settings
from spark_jobs.jars import ensure_jars
from spark_jobs.java import require_java, utf8_for_java

_TURN_SECONDS = 0.005
_MAKING_SPARK = "org.apache.spark.SparkContext.<init>"
_COMMANDS = (
    *("orchestration.marts.build", "orchestration.reconciliation", "spark_jobs.attribution.job"),
    *("spark_jobs.billing.job", "spark_jobs.corrections.backfill", "spark_jobs.ingest.runner", "spark_jobs.operate.compact"),
    *("spark_jobs.operate.fsck", "spark_jobs.operate.settle", "spark_jobs.operate.status", "spark_jobs.operate.vacuum"),
    *("spark_jobs.operate.watermark", "spark_jobs.traffic.review"),
)


class _Java:
    """A Java in which one ingest after the other runs its Spark."""

    def __init__(self, output: Path) -> None:
        settings = Settings()
        require_java()
        archive = class_archive(settings)
        shared = f" -XX:SharedArchiveFile={archive}" if archive else ""
        conf = SparkConf().setMaster("local[1]").setAppName("adtally-chaos")
        conf.set("spark.driver.memory", "512m")
        conf.set("spark.driver.extraJavaOptions", f"-XX:+UseSerialGC -XX:TieredStopAtLevel=1{shared}")
        conf.set("spark.driver.extraClassPath", os.pathsep.join(str(jar) for jar in ensure_jars(settings)))
        conf.set("spark.ui.showConsoleProgress", "false")
        with utf8_for_java(), output.open("ab") as log:
            popen = {"process_group": 0, "stdout": log, "stderr": log}
            self._gateway: JavaGateway = launch_gateway(conf, popen_kwargs=popen)  # type: ignore[no-untyped-call]
        self._process = psutil.Process(self._gateway.proc.pid)
        self._counted = 0.0

    def environment(self) -> dict[str, str]:
        """Return the variables by which a process finds this Java."""
        parameters = self._gateway.gateway_parameters
        return {"PYSPARK_GATEWAY_PORT": str(parameters.port), "PYSPARK_GATEWAY_SECRET": parameters.auth_token}

    def cpu_seconds(self) -> float:
        """Return the CPU time of Java and its Python workers since the last call."""
        times = self._process.cpu_times()
        total = times.user + times.system + times.children_user + times.children_system
        for child in self._process.children(recursive=True):
            try:
                of_child = child.cpu_times()
            except psutil.Error:
                continue
            total += of_child.user + of_child.system
        spent, self._counted = total - self._counted, max(total, self._counted)
        return max(spent, 0.0)

    def stop_spark(self) -> None:
        """Stop the Spark of a process that was killed, also one that Java was just making."""
        spark = self._gateway.jvm.org.apache.spark
        while self.makes_spark():
            time.sleep(_TURN_SECONDS)
        context = getattr(getattr(spark, "SparkContext$"), "MODULE$").getActive()  # Scala's object
        if context.isDefined():
            context.get().stop()
        spark.sql.SparkSession.clearDefaultSession()
        spark.sql.SparkSession.clearActiveSession()

    def makes_spark(self) -> bool:
        """Return whether a thread that serves a process is in the constructor of a SparkContext."""
        beans = self._gateway.jvm.java.lang.management.ManagementFactory.getThreadMXBean()
        serving = [thread for thread in beans.dumpAllThreads(False, False) if thread.getThreadName().startswith("Thread-")]
        return any(_MAKING_SPARK in frame.toString() for thread in serving for frame in thread.getStackTrace())

    def end(self) -> None:
        """Kill Java and its Python workers."""
        for process in [*self._process.children(recursive=True), self._process]:
            try:
                process.kill()
            except psutil.Error:
                continue
        self._gateway.proc.wait()


class _Server:
    def __init__(self, output: Path) -> None:
        self._output = output
        self._running: dict[int, tuple[str, bool]] = {}  # pid -> name, whether it uses Java
        self._java: _Java | None = None

    def serve(self) -> None:
        pending = b""
        while True:
            ready, _, _ = select.select([0], [], [], _TURN_SECONDS if self._running else None)
            if ready:
                read = os.read(0, 65_536)
                if not read:
                    break
                *lines, pending = (pending + read).split(b"\n")
                for line in lines:
                    self._start(json.loads(line))
            self._reap()
        if self._java is not None:
            self._java.end()

    def _start(self, request: dict[str, Any]) -> None:
        needs_java = request["arguments"][0] == "ingest"
        environment = dict(request["environment"])
        if needs_java and not any(uses for _, uses in self._running.values()):  # a second ingest is refused before it asks for Java
            if self._java is None:
                self._java = _Java(self._output)
            environment |= self._java.environment()
        pid = os.fork()
        if pid == 0:
            _become(request["arguments"], environment, request["output"])
        self._running[pid] = (request["start"], needs_java)
        _answer({"started": request["start"], "pid": pid})

    def _reap(self) -> None:
        for pid, (name, uses_java) in list(self._running.items()):
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended != pid:
                continue
            del self._running[pid]
            seconds = usage.ru_utime + usage.ru_stime
            if uses_java and self._java is not None:
                seconds += self._java.cpu_seconds()
                if not any(uses for _, uses in self._running.values()):
                    self._clean_java()
            _answer({"ended": name, "status": os.waitstatus_to_exitcode(status), "cpu_seconds": seconds})

    def _clean_java(self) -> None:
        assert self._java is not None
        try:
            self._java.stop_spark()
        except Exception:  # it has ended, or does not answer: the next ingest gets a new one
            self._java.end()
            self._java = None


def _become(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """Make this forked process the command, and end it with the command's exit status."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    SparkContext._gateway = SparkContext._jvm = None
    status = 1
    try:
        status = run(arguments)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _answer(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serve until standard input is closed. The argument is the file for the output of Java."""
    for name in _COMMANDS:
        __import__(name)
    _answer({"ready": True})
    _Server(Path(sys.argv[1])).serve()


if __name__ == "__main__":
    main()
