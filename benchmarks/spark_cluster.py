"""A Spark standalone cluster on loopback, of the pyspark that is installed: a master, and workers that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyspark

from services.launcher import ports, processes

SPARK_HOME = Path(pyspark.__file__).parent
_HIDING = """#!/bin/sh
exec unshare --mount sh -c 'mount -t tmpfs none "$0" && exec "$@"' "$ADTALLY_TEST_HIDDEN" "$ADTALLY_TEST_JAVA" "$@"
"""


@dataclass(frozen=True)
class Worker:
    """A worker of one core: as good as a machine, with its own address and disk."""

    host: str
    folder: Path
    process: psutil.Process

    def everything(self) -> list[psutil.Process]:
        """The worker, its executors and their Python processes."""
        with contextlib.suppress(psutil.Error):
            return [self.process, *self.process.children(recursive=True)]
        return []

    def writing(self, ending: str) -> psutil.Process | None:
        """A Python process of a task that has a file open whose path ends so, now stopped in the middle of it."""
        for process in self.everything():
            with contextlib.suppress(psutil.Error):
                if "python" in process.name() and _has_open(process, ending):
                    process.suspend()
                    if _has_open(process, ending):
                        return process
                    process.resume()
        return None

    def kill(self) -> None:
        """Everything at once, as when a machine goes."""
        for process in reversed(self.everything()):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)


def _has_open(process: psutil.Process, ending: str) -> bool:
    return any(file.path.endswith(ending) for file in process.open_files())


class Cluster:
    """A running master; ``workers`` are those that live."""

    def __init__(self, java: Path, folder: Path, hidden: Path | None) -> None:
        self._java, self._folder, self._hidden = java, folder, hidden
        self._port, self._ui = ports.choose(2)
        self.workers: list[Worker] = []
        self._started = 0
        self._master = self._spawn(
            "master", "master.Master", "127.0.0.1", "--port", str(self._port), "--webui-port", str(self._ui), folder=folder
        )

    @property
    def url(self) -> str:
        """What jobs are submitted to."""
        return f"spark://127.0.0.1:{self._port}"

    def add_worker(self) -> Worker:
        """Start one more, on an address of its own: Spark repeats a slow task only on another host."""
        self._started += 1
        name, host = f"worker-{self._started}", f"127.0.0.{self._started}"
        folder = self._folder / name
        arguments = ("--cores", "1", "--memory", "1g", "--work-dir", str(folder / "work"), "--webui-port", "0", self.url)
        worker = Worker(host, folder, self._spawn(name, "worker.Worker", host, *arguments, folder=folder))
        self.workers.append(worker)
        return worker

    def kill(self, worker: Worker) -> None:
        """Kill a worker with all that runs on it."""
        self.workers.remove(worker)
        worker.kill()

    def wait(self, seconds: float = 120) -> None:
        """Until all workers that live are with the master."""
        end = time.monotonic() + seconds
        while self._alive() != len(self.workers):
            assert time.monotonic() < end, [path.read_text()[-2000:] for path in self._folder.glob("*.log")]
            time.sleep(0.1)

    def catch(self, ending: str, going: Callable[[], bool], seconds: float = 120) -> tuple[Worker, psutil.Process]:
        """A task that writes a file whose path ends so, stopped in the middle of it, and the worker that it runs on."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and going():
            for worker in self.workers:
                process = worker.writing(ending)
                if process is not None:
                    return worker, process
            time.sleep(0.002)
        raise AssertionError(f"no task was seen writing {ending}")

    def end(self) -> None:
        """Kill all of it."""
        for worker in list(self.workers):
            self.kill(worker)
        self._master.kill()

    def _alive(self) -> int:
        # A ValueError: a master attaches its pages one by one, and for a moment answers with the page of another path.
        with (
            contextlib.suppress(OSError, ValueError),
            urllib.request.urlopen(f"http://127.0.0.1:{self._ui}/json/", timeout=5) as answer,
        ):
            return int(json.load(answer)["aliveworkers"])
        return 0

    def _spawn(self, name: str, role: str, host: str, *arguments: str, folder: Path) -> psutil.Process:
        folder.mkdir(parents=True, exist_ok=True)
        program, hiding = self._java, {}
        if self._hidden is not None and role != "master.Master":
            program, hiding = folder / "java", {"ADTALLY_TEST_HIDDEN": str(self._hidden), "ADTALLY_TEST_JAVA": str(self._java)}
            program.write_text(_HIDING)
            program.chmod(0o755)
        return processes.spawn(
            program,
            folder,
            name,
            ("-Xmx256m", "-cp", f"{SPARK_HOME}/jars/*", f"org.apache.spark.deploy.{role}", "--host", host, *arguments),
            output=self._folder / f"{name}.log",
            ends_with_parent=True,
            environment={
                "SPARK_HOME": str(SPARK_HOME),
                "SPARK_SCALA_VERSION": "2.13",
                "SPARK_LOCAL_IP": host,
                "SPARK_LOCAL_DIRS": str(folder / "local"),
                "PATH": os.defpath,  # none of our environment's: an executor has to be told its Python
                "PYTHONPATH": "",
                **hiding,
            },
        )


def can_hide() -> bool:
    """Whether a process of this user can have folders that another one does not see, as on machines of their own."""
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


@contextmanager
def standalone_cluster(java: Path, folder: Path, workers: int = 2, hidden: Path | None = None) -> Iterator[Cluster]:
    """A cluster that is gone at the end. Its workers do not see the files below ``hidden``: see `can_hide`."""
    cluster = Cluster(java, folder, hidden)
    try:
        for _ in range(workers):
            cluster.add_worker()
        cluster.wait()
        yield cluster
    finally:
        cluster.end()
