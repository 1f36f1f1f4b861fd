"""Keeps processes running: starts each under a guard, starts it again when it ends, and ends it in bounded time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestration.up import guard
from spark_jobs.errors import AdtallyError, UsageError

WRONG_USE = UsageError.exit_code
"""Exit status of a process that another start cannot help."""

_GUARD_SECONDS = guard.REST_SECONDS * 3  # what a guard may take beyond the time that its command has

Tell = Callable[[str, str], None]
"""Told the name of a process and what has become of it."""


@dataclass(frozen=True)
class Backoff:
    """How long to wait before a start, by the number of failures in a row; a run of ``well_seconds`` ends the row."""

    first_seconds: float = 1.0
    most_seconds: float = 60.0
    well_seconds: float = 60.0

    def delay(self, failures: int) -> float:
        """Seconds before the next start, doubled with each failure."""
        return float(min(self.first_seconds * 2 ** min(failures - 1, 30), self.most_seconds))


@dataclass(frozen=True)
class Service:
    """A process to keep running. Where ``asks_all``, SIGTERM goes to what it has started as well."""

    name: str
    command: tuple[str, ...]
    stop_seconds: float
    asks_all: bool = False


@dataclass
class _Watched:
    service: Service
    guard: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    failures: int = 0
    start_at: float | None = None


class Supervisor:
    """Processes by name, each with a log in ``logs``. The environment is that of all of them."""

    def __init__(
        self,
        logs: Path,
        environment: Mapping[str, str],
        tell: Tell,
        *,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logs, self._environment, self._tell, self._clock = logs, dict(environment), tell, clock
        self._backoff = backoff or Backoff()
        self._watched: dict[str, _Watched] = {}

    def start(self, service: Service) -> None:
        """Start a process and watch it from now on."""
        watched = self._watched[service.name] = _Watched(service)
        self._tell(service.name, "starting")
        self._launch(watched)

    def log(self, name: str) -> Path:
        """Where the output of a process goes."""
        return self._logs / f"{name}.log"

    def runs(self, name: str) -> bool:
        """Whether the process runs now."""
        watched = self._watched.get(name)
        return watched is not None and watched.guard is not None and watched.guard.poll() is None

    def gave_up(self, name: str) -> bool:
        """Whether the process has ended and will not be started again."""
        watched = self._watched[name]
        return watched.guard is None and watched.start_at is None

    def check(self) -> None:
        """Tell of each process that has ended, and start those whose time has come."""
        for watched in self._watched.values():
            if watched.guard is not None and (status := watched.guard.poll()) is not None:
                self._after_end(watched, status)
            if watched.start_at is not None and self._clock() >= watched.start_at:
                self._tell(watched.service.name, "starting again")
                self._launch(watched)

    def ask_to_end(self, name: str) -> None:
        """Ask a process to end, and do not start it again. Does not wait."""
        watched = self._watched.get(name)
        if watched is None:
            return
        watched.start_at = None
        if watched.guard is not None and watched.guard.poll() is None:
            self._tell(name, "ending")
            _say(watched.guard, b"t")

    def wait_ended(self, name: str, hurry: Callable[[], bool]) -> None:
        """Wait until a process that was asked to end has ended; it is killed after its time, or when ``hurry`` says so."""
        watched = self._watched.get(name)
        if watched is None or watched.guard is None:
            return
        deadline = self._clock() + watched.service.stop_seconds + _GUARD_SECONDS
        killed = False
        while (status := watched.guard.poll()) is None and self._clock() < deadline:
            if hurry() and not killed:
                killed = True
                _say(watched.guard, b"k")
            time.sleep(0.05)
        if status is None:  # the guard itself hangs
            watched.guard.kill()
            status = watched.guard.wait()
        self._forget(watched)
        self._tell(name, "ended" if status in (0, 128 + signal.SIGTERM) else f"ended with {_status(status)}")

    def _launch(self, watched: _Watched) -> None:
        service, log = watched.service, self.log(watched.service.name)
        scope = "all" if service.asks_all else "first"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            watched.guard = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, str(log), str(service.stop_seconds), scope, *service.command],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        watched.started_at, watched.start_at = self._clock(), None

    def _after_end(self, watched: _Watched, status: int) -> None:
        name, ran = watched.service.name, self._clock() - watched.started_at
        self._forget(watched)
        reason = last_error(self.log(name))
        said = f": {reason}" if reason else f"; see {self.log(name)}"
        if status == WRONG_USE:
            self._tell(name, f"ended with {_status(status)} and is not started again{said}")
            return
        watched.failures = 1 if ran >= self._backoff.well_seconds else watched.failures + 1
        delay = self._backoff.delay(watched.failures)
        watched.start_at = self._clock() + delay
        self._tell(name, f"ended with {_status(status)} after {ran:.0f} s, next start in {delay:g} s{said}")

    @staticmethod
    def _forget(watched: _Watched) -> None:
        if watched.guard is not None and watched.guard.stdin is not None:
            with contextlib.suppress(OSError):
                watched.guard.stdin.close()
        watched.guard = None


def _say(process: subprocess.Popen[bytes], word: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it has just ended
        os.write(process.stdin.fileno(), word)


def _status(status: int) -> str:
    number = -status if status < 0 else status - 128
    if number > 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(number).name
    return f"status {status}"


def last_error(log: Path, *, limit: int = 300) -> str:
    """The last line of a log that says what went wrong: adtally's own error line, else that of a stack trace; else empty."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16_384))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    lines = lines[max((n for n, line in enumerate(lines) if " started: " in line and line.startswith("---")), default=0) :]
    own = [line.removeprefix("adtally: error: ") for line in lines if line.startswith("adtally: error: ")]
    traced = [line for line in lines if line.split(":")[0].rsplit(".", 1)[-1].endswith(("Error", "Exception"))]
    found = " ".join((own or traced or [""])[-1].split())
    return found if len(found) <= limit else found[: limit - 3] + "..."


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log, for whoever has to find out."""
    try:
        return "\n".join(log.read_text("utf-8", "replace").splitlines()[-lines:])
    except OSError as error:
        return f"{log}: {error.strerror}"


class NotReadyError(AdtallyError):
    """A process did not become ready in time."""
