"""Stands between ``adtally up`` and one of its processes: no process outlives it, and no log grows without end.

Run as a file, the leader of a session of its own: ``guard.py LOG STOP_SECONDS SCOPE COMMAND...``. Its standard input is a pipe
whose other end only the supervisor holds:

- ``t``, or the end of the pipe (the supervisor is gone, however it ended), asks the command to end by SIGTERM: the command alone
  with SCOPE ``first``, all of the session with SCOPE ``all``. What is left after STOP_SECONDS is killed.
- ``k`` kills all of it now.

When the command has ended, what it left behind is ended too. The exit status is the command's, 128 + n where signal n ended it.
It imports nothing of this project, so that it starts at once and stays small.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import psutil

LOG_BYTES = 8 * 1024 * 1024
LOGS_KEPT = 2
REST_SECONDS = 5.0  # for what the command left behind

_COLOURS = re.compile(rb"\x1b\[[0-9;]*m")
_SET_PDEATHSIG = 1
_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class BoundedLog:
    """A log file that is renamed to ``.1`` (that to ``.2``) when it is full."""

    def __init__(self, path: Path, *, limit: int = LOG_BYTES, kept: int = LOGS_KEPT) -> None:
        self._path, self._limit, self._kept = path, limit, kept
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        """Append; a disk that is full loses the log, never the process."""
        with contextlib.suppress(OSError):
            if self._file.tell() + len(data) > self._limit and self._file.tell():
                self._turn()
            self._file.write(data)

    def say(self, text: str) -> None:
        """A line of the guard's own."""
        self.write(f"--- {datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}\n".encode())

    def _turn(self) -> None:
        self._file.close()
        older = [self._path.with_name(f"{self._path.name}.{n}") for n in range(1, self._kept + 1)]
        for source, target in reversed(list(zip([self._path, *older], older, strict=False))):
            if source.exists():
                source.replace(target)
        self._file = self._path.open("ab", buffering=0)


def others_of_session(session: int) -> list[psutil.Process]:
    """Processes of a session, and whatever descends from its leader, but the leader itself. The dead do not count."""
    found: dict[int, psutil.Process] = {}
    with contextlib.suppress(psutil.Error):
        found = {process.pid: process for process in psutil.Process(session).children(recursive=True)}
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if pid != session and os.getsid(pid) == session:
                found.setdefault(pid, psutil.Process(pid))
    return [process for process in found.values() if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def signal_session(session: int, number: signal.Signals) -> None:
    """Send a signal to all of a session but its leader."""
    for process in others_of_session(session):
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


class Guard:
    """One command, its log, and the time by which it has to end."""

    def __init__(self, log: BoundedLog, stop_seconds: float, scope: str, command: list[str]) -> None:
        self._log, self._stop_seconds, self._scope, self._command = log, stop_seconds, scope, command
        self._deadline: float | None = None
        self._wake_in, self._wake_out = os.pipe()
        self._selector = selectors.DefaultSelector()
        self._signals: set[int] = set()

    def run(self) -> int:
        """Start the command, stand by until it and all that it left behind have ended; its exit status."""
        self._listen()
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
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector.register(self._process.stdout, selectors.EVENT_READ, self._copy_output)
        while not self._ended():
            self._turn()
        status = self._process.returncode
        self._end_rest()
        self._copy_output()
        self._log.say(f"ended with {f'status {status}' if status >= 0 else signal.Signals(-status).name}")
        return status if status >= 0 else 128 - status

    def _listen(self) -> None:
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        signal.set_wakeup_fd(self._wake_out, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, self._note)
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._woken)
        self._selector.register(0, selectors.EVENT_READ, self._told)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signals.add(number)

    def _turn(self) -> None:
        timeout = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        for key, _ in self._selector.select(timeout):
            key.data()
        if self._deadline is not None and time.monotonic() >= self._deadline and self._process.poll() is None:
            self._kill()

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_in, 4096)
        if self._signals - {signal.SIGCHLD}:
            self._ask()
        self._signals.clear()

    def _told(self) -> None:
        word = os.read(0, 64)
        if not word:
            self._selector.unregister(0)
        if b"k" in word:
            self._kill()
        else:
            self._ask()

    def _ask(self) -> None:
        """Ask the command to end, once."""
        if self._deadline is not None:
            return
        self._deadline = time.monotonic() + self._stop_seconds
        self._log.say("asked to end")
        if self._scope == "all":
            signal_session(os.getpid(), signal.SIGTERM)
        elif self._process.poll() is None:
            self._process.terminate()

    def _kill(self) -> None:
        self._log.say("killed: it did not end in time, or was not to be waited for")
        signal_session(os.getpid(), signal.SIGKILL)
        self._deadline = time.monotonic() + REST_SECONDS

    def _ended(self) -> bool:
        """Whether the command has ended. Collects the orphans that have become this process's children."""
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                dead = None
            if dead is None or dead.si_pid == self._process.pid:
                return self._process.poll() is not None
            os.waitpid(dead.si_pid, 0)

    def _end_rest(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + REST_SECONDS
            signal_session(os.getpid(), number)
            while others_of_session(os.getpid()) and time.monotonic() < deadline:
                self._copy_output()
                time.sleep(0.05)

    def _copy_output(self) -> None:
        """What the command wrote, up to a few buffers: one that never stops writing can still be asked to end."""
        assert self._process.stdout is not None
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):
                data = os.read(self._process.stdout.fileno(), 65536)
                self._log.write(_COLOURS.sub(b"", data))
                if not data:  # nobody writes any more
                    with contextlib.suppress(KeyError):
                        self._selector.unregister(self._process.stdout)
                    return


def main(arguments: list[str]) -> int:
    """Run the guard for the command line; its exit status."""
    log, stop_seconds, scope, *command = arguments
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    try:
        return Guard(BoundedLog(Path(log)), float(stop_seconds), scope, command).run()
    except OSError as error:  # the command cannot be started
        print(f"adtally: error: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
