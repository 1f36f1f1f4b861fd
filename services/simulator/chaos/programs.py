"""Starts, kills and awaits real ``adtally`` processes through the fork server (orchestration/cli/fork_server.py)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.errors import HintedError

_SERVER = "orchestration.cli.fork_server"
_LONGEST_SECONDS = 900.0  # a command that takes longer hangs


class ProgramError(HintedError, RuntimeError):
    """The fork server does not work."""


class HangError(RuntimeError):
    """A command does not end."""


@dataclass(frozen=True)
class Ended:
    """How a command ended. ``status`` is negative for a signal."""

    arguments: tuple[str, ...]
    status: int
    said: str

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.status == -signal.SIGKILL

    @property
    def words(self) -> str:
        """The command as a person types it."""
        return " ".join(("adtally", *self.arguments))


class Programs:
    """A fork server and what its commands cost. Use as a context manager.

    ``variables`` are for all that it starts, also for the one Java in which all ingests run.
    """

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self._folder = folder
        self._variables = variables
        self._names = itertools.count()
        self._buffer = b""
        self._pids: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._calls: dict[str, tuple[str, ...]] = {}
        self.cpu_seconds = 0.0
        self.commands = 0

    def __enter__(self) -> Programs:
        self._folder.mkdir(parents=True, exist_ok=True)
        log = (self._folder / "fork-server.log").open("ab")
        self._server = subprocess.Popen(
            [sys.executable, "-m", _SERVER, str(self._folder / "java.log")],
            env=clean_environment() | self._variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        log.close()
        if not self._read(_LONGEST_SECONDS).get("ready"):
            raise ProgramError("the fork server does not start", hint=f"see {self._folder / 'fork-server.log'}")
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._pids):
            self.kill(name, whole_group=True)
        assert self._server.stdin is not None
        self._server.stdin.close()
        try:
            self._server.wait(30)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def start(self, arguments: tuple[str, ...], environment: dict[str, str]) -> str:
        """Start a command and return its name."""
        name = str(next(self._names))
        self._calls[name] = arguments
        self._output(name).touch()  # it may be killed before it opens the file
        request = {"start": name, "arguments": arguments, "environment": environment, "output": str(self._output(name))}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        while name not in self._pids:
            self._take(self._read(_LONGEST_SECONDS))
        self.commands += 1
        return name

    def is_running(self, name: str) -> bool:
        """Return whether a command has not ended yet."""
        while (line := self._read(0.0)) != {}:
            self._take(line)
        return name not in self._ended

    def kill(self, name: str, *, whole_group: bool = False) -> None:
        """Kill a command with SIGKILL; with ``whole_group`` also the processes that it started."""
        pid = self._pids.get(name)
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if whole_group else os.kill)(pid, signal.SIGKILL)

    def wait(self, name: str, kill_after_ms: int | None = None) -> Ended:
        """Wait for a command, and kill it after some milliseconds if they are given. Raises HangError if it does not end."""
        started = time.monotonic()
        if kill_after_ms is not None:
            while time.monotonic() < started + kill_after_ms / 1000 and self.is_running(name):
                time.sleep(0.002)
            self.kill(name)
        while name not in self._ended:
            line = self._read(_LONGEST_SECONDS - (time.monotonic() - started))
            if line == {}:
                self.kill(name, whole_group=True)
                raise HangError(f"adtally {' '.join(self._calls[name])} has not ended in {_LONGEST_SECONDS:.0f} s")
            self._take(line)
        said = self._output(name).read_text("utf-8", "replace")
        self._output(name).unlink()
        return Ended(self._calls.pop(name), self._ended.pop(name), said)

    def _output(self, name: str) -> Path:
        return self._folder / f"output-{name}.txt"

    def _take(self, line: dict[str, Any]) -> None:
        if "started" in line:
            self._pids[line["started"]] = line["pid"]
        elif "ended" in line:
            self._pids.pop(line["ended"], None)
            self._ended[line["ended"]] = line["status"]
            self.cpu_seconds += line["cpu_seconds"]

    def _read(self, seconds: float) -> dict[str, Any]:
        """Return the next answer; an empty one if none comes in time."""
        assert self._server.stdout is not None
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._server.stdout], [], [], max(seconds, 0.0))
            if not ready:
                return {}
            read = os.read(self._server.stdout.fileno(), 65_536)
            if not read:
                raise ProgramError("the fork server has ended", hint=f"see {self._folder / 'fork-server.log'}")
            self._buffer += read
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer


def clean_environment() -> dict[str, str]:
    """Return this process's environment without settings, for a process that imports what this one can import."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("ADTALLY_") or name == "ADTALLY_CACHE_DIR"}
    paths = [path for path in sys.path if path and not path.endswith(".zip")]
    return {**kept, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "SPARK_LOCAL_IP": "127.0.0.1"}
