"""Keeps processes running: starts each under a guard, restarts it with a growing delay, and ends it in bounded time."""

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
from spark_jobs.errors import UsageError

_GUARD_SECONDS = guard.REST_SECONDS * 3  # what a guard may take beyond the time that its command has

Tell = Callable[[str, str], None]
"""Called with the name of a process and its change of state."""


@dataclass(frozen=True)
class Backoff:
    """How long to wait before a restart: twice as long after each failure in a row. A run of ``well_seconds`` ends the row."""

    first_seconds: float = 1.0
    most_seconds: float = 60.0
    well_seconds: float = 60.0

    def delay(self, failures: int) -> float:
        """Return the seconds before the restart after ``failures`` in a row."""
        return float(min(self.first_seconds * 2 ** min(failures - 1, 30), self.most_seconds))


@dataclass(frozen=True)
class Service:
    """A process to keep running. If ``asks_all``, its children get SIGTERM as well."""

    name: str
    command: tuple[str, ...]
    stop_seconds: float
    asks_all: bool = False


@dataclass
class _Watched:
    """A service: its guard while it runs, or the time of the next start. Neither: it is not started again."""

    service: Service
    guard: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    failures: int = 0
    start_at: float | None = None


class Supervisor:
    """Runs services by name, all with the same environment, each with a log in ``logs``."""

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
        """Start a service and restart it whenever it ends."""
        self._watched[service.name] = _Watched(service)
        self._launch(self._watched[service.name], "starting")

    def log(self, name: str) -> Path:
        """Return the path of a service's log."""
        return self._logs / f"{name}.log"

    def runs(self, name: str) -> bool:
        """Return whether the service runs now."""
        watched = self._watched.get(name)
        return watched is not None and watched.guard is not None and watched.guard.poll() is None

    def gave_up(self, name: str) -> bool:
        """Return whether the service has ended and will not be restarted."""
        return self._watched[name].guard is None and self._watched[name].start_at is None

    def check(self) -> None:
        """Report each service that has ended, and restart those whose delay is over."""
        for watched in self._watched.values():
            if watched.guard is not None and (status := watched.guard.poll()) is not None:
                self._after_end(watched, status)
            if watched.start_at is not None and self._clock() >= watched.start_at:
                self._launch(watched, "starting again")

    def ask_to_end(self, name: str) -> None:
        """Ask a service to end, and do not restart it. Does not wait."""
        if watched := self._watched.get(name):
            watched.start_at = None
            if self.runs(name):
                self._tell(name, "ending")
                _send(watched.guard, b"t")

    def wait_ended(self, name: str, hurry: Callable[[], bool]) -> None:
        """Wait until a service that was asked to end has ended. It is killed after its time, or when ``hurry`` returns true."""
        watched = self._watched.get(name)
        if watched is None or watched.guard is None:
            return
        deadline = self._clock() + watched.service.stop_seconds + _GUARD_SECONDS
        killed = False
        while (status := watched.guard.poll()) is None and self._clock() < deadline:
            if not killed and hurry():
                killed = True
                _send(watched.guard, b"k")
            time.sleep(0.05)
        if status is None:  # the guard itself hangs
            watched.guard.kill()
            status = watched.guard.wait()
        _close(watched)
        self._tell(name, "ended" if status in (0, 128 + signal.SIGTERM) else f"ended with {_status(status)}")

    def _launch(self, watched: _Watched, said: str) -> None:
        service, log = watched.service, self.log(watched.service.name)
        self._tell(service.name, said)
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
        _close(watched)
        reason = last_error(self.log(name))
        said = f": {reason}" if reason else f"; see {self.log(name)}"
        if status == UsageError.exit_code:  # a restart cannot help
            self._tell(name, f"ended with {_status(status)} and is not started again{said}")
            return
        watched.failures = 1 if ran >= self._backoff.well_seconds else watched.failures + 1
        delay = self._backoff.delay(watched.failures)
        watched.start_at = self._clock() + delay
        self._tell(name, f"ended with {_status(status)} after {ran:.0f} s, next start in {delay:g} s{said}")


def _send(process: subprocess.Popen[bytes] | None, word: bytes) -> None:
    assert process is not None and process.stdin is not None
    with contextlib.suppress(OSError):  # it has just ended
        os.write(process.stdin.fileno(), word)


def _close(watched: _Watched) -> None:
    assert watched.guard is not None
    watched.guard.communicate()  # closes the pipe
    watched.guard = None


def _status(status: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(-status if status < 0 else status - 128).name
    return f"status {status}"


def last_error(log: Path, *, limit: int = 300) -> str:
    """Return the last error since the last start: an error line of adtally, else of a stack trace, else the empty string."""
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
