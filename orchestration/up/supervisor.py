"""Keeps a process running: starts it under a guard, restarts it with a growing delay, and ends it in bounded time."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from orchestration.up import guard
from spark_jobs.errors import UsageError
from spark_jobs.failure import one_line

_GUARD_SECONDS = guard.REST_SECONDS * 3  # what a guard may take beyond the time that its command has
_LOG_BYTES_READ = 16_384
_ASKED = (0, 128 + signal.SIGTERM, -signal.SIGTERM)  # statuses after SIGTERM; the last of a guard that had not started its command

Tell = Callable[[str, str], None]
"""Called with the name of a process and its change of state."""


class Backoff(NamedTuple):
    """The delay before a restart doubles with each failure in a row. A run of ``well_seconds`` ends the row."""

    first_seconds: float = 1.0
    most_seconds: float = 60.0
    well_seconds: float = 60.0


class Service:
    """A process to keep running, with a log. If ``asks_all``, its children get SIGTERM as well."""

    def __init__(
        self,
        name: str,
        command: tuple[str, ...],
        *,
        logs: Path,
        environment: Mapping[str, str],
        tell: Tell,
        stop_seconds: float,
        asks_all: bool = False,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.command, self.log = name, command, logs / f"{name}.log"
        self._environment, self._tell, self._clock, self._backoff = environment, tell, clock, backoff or Backoff()
        self._stop_seconds, self._asks_all = stop_seconds, asks_all
        self._guard: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._failures = 0
        self._start_at: float | None = None

    @property
    def is_running(self) -> bool:
        """Whether it runs now."""
        return self._guard is not None and self._guard.poll() is None

    @property
    def gave_up(self) -> bool:
        """Whether it has ended and will not be restarted."""
        return self._guard is None and self._start_at is None

    def start(self, said: str = "starting") -> None:
        """Start it. `check` restarts it whenever it ends."""
        self._tell(self.name, said)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        scope = "all" if self._asks_all else "first"
        with self.log.open("ab") as errors:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, str(self.log), str(self._stop_seconds), scope, *self.command],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        self._started_at, self._start_at = self._clock(), None

    def check(self) -> None:
        """Report that it has ended, or restart it when its delay is over."""
        if self._guard is not None and self._guard.poll() is not None:
            self._plan_restart(self._collect_guard(self._guard))
        if self._start_at is not None and self._clock() >= self._start_at:
            self.start("starting again")

    def ask_to_end(self) -> None:
        """Ask it to end, and do not restart it. Does not wait."""
        self._start_at = None
        if self._guard is not None and self._guard.poll() is None:
            self._tell(self.name, "ending")
            self._guard.terminate()

    def wait_ended(self, hurry: Callable[[], bool]) -> None:
        """Wait until it has ended, once asked to. It is killed after its time, or when ``hurry`` returns true."""
        if self._guard is None:
            return
        deadline, is_killed = self._clock() + self._stop_seconds + _GUARD_SECONDS, False
        while self._guard.poll() is None and self._clock() < deadline:
            if not is_killed and hurry():
                is_killed = True
                self._guard.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
        if self._guard.poll() is None:  # the guard itself hangs
            self._guard.kill()
        status = self._collect_guard(self._guard)
        self._tell(self.name, "ended" if status in _ASKED else f"ended with {_status(status)}")

    def _collect_guard(self, ended: subprocess.Popen[bytes]) -> int:
        ended.communicate()  # closes the pipe
        self._guard = None
        return ended.returncode

    def _plan_restart(self, status: int) -> None:
        ran = self._clock() - self._started_at
        reason = last_error(self.log)
        said = f": {reason}" if reason else f"; see {self.log}"
        if status == UsageError.exit_code:  # a restart cannot help
            self._tell(self.name, f"ended with {_status(status)} and is not started again{said}")
            return
        self._failures = 1 if ran >= self._backoff.well_seconds else self._failures + 1
        delay = float(min(self._backoff.first_seconds * 2 ** min(self._failures - 1, 30), self._backoff.most_seconds))
        self._start_at = self._clock() + delay
        self._tell(self.name, f"ended with {_status(status)} after {ran:.0f} s, next start in {delay:g} s{said}")


def _status(status: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(-status if status < 0 else status - 128).name
    return f"status {status}"


def last_error(log: Path) -> str:
    """Return the last error since the last start: an error line of adtally, else of a stack trace, else the empty string."""
    text = log.read_bytes()[-_LOG_BYTES_READ:].decode("utf-8", "replace") if log.exists() else ""
    lines = text.splitlines()
    lines = lines[max((n for n, line in enumerate(lines) if " started: " in line and line.startswith("---")), default=0) :]
    own = [line.removeprefix("adtally: error: ") for line in lines if line.startswith("adtally: error: ")]
    traced = [line for line in lines if line.split(":")[0].rsplit(".", 1)[-1].endswith(("Error", "Exception"))]
    return one_line((own or traced or [""])[-1])
