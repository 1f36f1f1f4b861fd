"""Runs one command of ``adtally up``, so that no process outlives it and no log grows without end.

    python guard.py LOG STOP_SECONDS SCOPE COMMAND...

The supervisor starts it as the leader of a session and holds the only other end of the pipe at its standard input:

- ``t``, or the end of the pipe (the supervisor has ended, in whatever way), asks the command to end by SIGTERM. SCOPE ``first``
  signals the command alone, ``all`` every process of the session. After STOP_SECONDS the guard kills what is left.
- ``k`` kills everything at once.

When the command has ended, the guard also ends what the command left behind. Its exit status is the command's, or 128 + n if
signal n ended the command. It imports nothing of this project, so that it starts at once and stays small.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

LOG_BYTES = 8 * 1024 * 1024
LOGS_KEPT = 2
REST_SECONDS = 5.0  # for what the command left behind

_TURN_SECONDS = 0.2
_COLOURS = re.compile(rb"\x1b\[[0-9;]*m")
_SET_PDEATHSIG = 1
_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class BoundedLog:
    """A log file. A full one is renamed to ``.1``, an older ``.1`` to ``.2``."""

    def __init__(self, path: Path, *, limit: int = LOG_BYTES, kept: int = LOGS_KEPT) -> None:
        self._limit = limit
        self._paths = [path, *(path.with_name(f"{path.name}.{n}") for n in range(1, kept + 1))]
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        """Append data. A full disk loses the log, never the process."""
        with contextlib.suppress(OSError):
            if self._file.tell() and self._file.tell() + len(data) > self._limit:
                self._file.close()
                for newer, older in reversed(list(zip(self._paths, self._paths[1:], strict=False))):
                    if newer.exists():
                        newer.replace(older)
                self._file = self._paths[0].open("ab", buffering=0)
            self._file.write(data)

    def say(self, text: str) -> None:
        """Append a line of the guard itself."""
        self.write(f"--- {datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}\n".encode())


def others_of_session() -> list[psutil.Process]:
    """Return the living processes of this session and the descendants of this process, without this process."""
    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if process.pid != os.getpid() and os.getsid(process.pid) == os.getpid():
                found[process.pid] = process
    living = []
    for process in found.values():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
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
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        _prctl(_SET_CHILD_SUBREAPER, 1)  # orphans become children of this process, so that it finds them
        self._log.say(f"started: {' '.join(' '.join(self._command).split())}")
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: _prctl(_SET_PDEATHSIG, signal.SIGTERM),  # safe: this process has one thread
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._output, False)
        self._inputs = {0, self._output}
        while not self._has_ended():
            self._turn()
        self._end_rest()
        status = self._process.returncode
        self._log.say(f"ended with {f'status {status}' if status >= 0 else signal.Signals(-status).name}")
        return status if status >= 0 else 128 - status

    def _on_signal(self, *_: object) -> None:
        self._is_asked = True

    def _turn(self) -> None:
        """Copy output and obey the supervisor, signals and the deadline. Takes at most _TURN_SECONDS."""
        readable = select.select(self._inputs, [], [], _TURN_SECONDS)[0]
        if 0 in readable:
            word = os.read(0, 64)
            self._inputs -= {0} if not word else set()
            self._is_asked, self._must_kill = True, b"k" in word
        if self._output in readable:
            self._copy_output()
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

    def _has_ended(self) -> bool:
        """Return whether the command has ended. Collects the exit status of orphans, which are children of this process."""
        with contextlib.suppress(ChildProcessError):
            while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if dead.si_pid == self._process.pid:
                    break
                os.waitpid(dead.si_pid, 0)
        return self._process.poll() is not None

    def _end_rest(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + REST_SECONDS
            signal_others(number)
            while others_of_session() and time.monotonic() < deadline:
                self._copy_output()
                time.sleep(0.05)
        self._copy_output()

    def _copy_output(self) -> None:
        """Copy some of the output to the log: a command that never stops writing can still be asked to end."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):
                data = os.read(self._output, 65536)
                if not data:  # nobody writes any more
                    self._inputs.discard(self._output)
                    return
                self._log.write(_COLOURS.sub(b"", data))


def main(arguments: list[str]) -> int:
    """Run the guard for the command line and return its exit status."""
    log, stop_seconds, scope, *command = arguments
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    try:
        return Guard(BoundedLog(Path(log)), float(stop_seconds), scope, command).run()
    except OSError as error:  # the command cannot be started
        print(f"adtally: error: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
