"""Runs one command of ``adtally up``, so that no process outlives it and no log grows without end.

    python guard.py LOG STOP_SECONDS SCOPE COMMAND...

The supervisor starts it as the leader of a session and holds the only other end of the pipe at its standard input:

- SIGTERM, or the end of the pipe (the supervisor has ended, in whatever way), asks the command to end by SIGTERM. SCOPE ``first``
  signals the command alone, ``all`` every process of the session. After STOP_SECONDS the guard kills what is left.
- SIGUSR1 kills everything at once.

When the command has ended, the guard also ends what the command left behind. Its exit status is the command's, or 128 + n if
signal n ended the command. It imports nothing of this project, so that it starts at once and stays small.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler

import psutil

REST_SECONDS = 5.0  # for what the command left behind

_TURN_SECONDS = 0.2
_COLOURS = re.compile(rb"\x1b\[[0-9;]*m")
_SET_PDEATHSIG = 1
_SET_CHILD_SUBREAPER = 36

logging.raiseExceptions = False  # a full disk loses the log, never the process


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class BoundedLog(RotatingFileHandler):
    """A log file. A full one is renamed to ``.1``, an older ``.1`` to ``.2``."""

    terminator = ""

    def __init__(self, path: str | os.PathLike[str], *, limit: int = 8 * 1024 * 1024, kept: int = 2) -> None:
        super().__init__(path, maxBytes=limit, backupCount=kept, encoding="utf-8", errors="surrogateescape")

    def write(self, data: bytes) -> None:
        """Append data."""
        self.handle(logging.makeLogRecord({"msg": data.decode("utf-8", "surrogateescape")}))

    def say(self, text: str) -> None:
        """Append a line of the guard itself."""
        self.write(f"--- {datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}\n".encode())


def others_of_session() -> list[psutil.Process]:
    """Return the living processes of this session and the descendants of this process, without this process."""
    found = set(psutil.Process().children(recursive=True))
    living = []
    for process in found.union(psutil.process_iter()):
        with contextlib.suppress(OSError, psutil.Error):
            is_other = process in found or (process.pid != os.getpid() and os.getsid(process.pid) == os.getpid())
            if is_other and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def signal_others(number: signal.Signals) -> None:
    """Send a signal to all of the session but this process."""
    for process in others_of_session():
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


class Guard:
    """One command, its log, and the time by which it has to end."""

    def __init__(self, log: BoundedLog, stop_seconds: float, scope: str, command: list[str]) -> None:
        self._log, self._stop_seconds, self._scope, self._command = log, stop_seconds, scope, command
        self._is_asked = self._must_kill = False
        self._deadline = math.inf

    def run(self) -> int:
        """Start the command, wait until it and all that it left behind have ended, and return its exit status."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        _prctl(_SET_CHILD_SUBREAPER, 1)  # orphans become children of this process, so that it finds them
        self._log.say(f"started: {' '.join(' '.join(self._command).split())}")
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            preexec_fn=lambda: _prctl(_SET_PDEATHSIG, signal.SIGTERM),  # safe: this process has one thread
        )
        copying = threading.Thread(target=self._copy_output, daemon=True)
        copying.start()
        while self._is_running():
            self._turn()
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + REST_SECONDS
            signal_others(number)
            while others_of_session() and time.monotonic() < deadline:
                time.sleep(0.05)
        copying.join(REST_SECONDS)
        status = self._process.returncode
        self._log.say(f"ended with {f'status {status}' if status >= 0 else signal.Signals(-status).name}")
        return status if status >= 0 else 128 - status

    def _on_signal(self, number: int, _frame: object) -> None:
        self._is_asked = True
        self._must_kill = self._must_kill or number == signal.SIGUSR1

    def _copy_output(self) -> None:
        output = self._process.stdout
        assert output is not None
        while data := output.read(65536):
            self._log.write(_COLOURS.sub(b"", data))

    def _is_running(self) -> bool:
        """Return whether the command runs. Collects the exit status of orphans, which are children of this process."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._process.pid:
                    self._process.returncode = os.waitstatus_to_exitcode(ended[1])
        return self._process.returncode is None

    def _turn(self) -> None:
        """Obey the supervisor, signals and the deadline. Takes _TURN_SECONDS at most."""
        if select.select([] if self._is_asked else [0], [], [], _TURN_SECONDS)[0]:
            self._is_asked = True  # nobody writes: this is the end of the pipe
        if self._is_asked and self._deadline == math.inf:
            self._deadline = time.monotonic() + self._stop_seconds
            self._log.say("asked to end")
            if self._scope == "all":
                signal_others(signal.SIGTERM)
            else:
                self._process.terminate()
        if self._must_kill or time.monotonic() >= self._deadline:
            self._must_kill, self._deadline = False, time.monotonic() + REST_SECONDS
            self._log.say("killed: it did not end in time, or was not to be waited for")
            signal_others(signal.SIGKILL)


if __name__ == "__main__":
    path, seconds, scope, *command = sys.argv[1:]
    sys.exit(Guard(BoundedLog(path), float(seconds), scope, command).run())
