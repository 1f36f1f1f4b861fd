"""Starts processes that outlive the command which starts them, and finds them again by a mark on their command line.

A pid alone proves nothing: after a kill or a reboot another program may have it. The mark names the service's folder and the role.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from services.launcher.errors import ServiceError

_SET_PDEATHSIG = 1
_NO_NEWS = re.compile(r"^\s*(at |\.\.\. |$)")  # lines within a stack trace
_FAULT = re.compile(r"\b(ERROR|FATAL|SEVERE)\b|(Exception|Error)\b|^[EF]\d{4} ")  # the last: of glog, as in E1129 16:21:31
_GO_DUMP = "\ngoroutine "  # Go's stacks of all threads, after the line that names the fault
_TAIL_BYTES = 1_048_576
_LONGEST_CAUSE = 300


def mark(folder: Path, role: str) -> str:
    """Return the argument that marks a process of a service. Java takes it for an option."""
    return f"-Dadtally.service={folder}:{role}"


def find(folder: Path, role: str) -> list[psutil.Process]:
    """Return the living processes of one role of a service; more than one only after a fault."""
    wanted, found = mark(folder, role), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if wanted in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def spawn(
    executable: Path,
    folder: Path,
    role: str,
    arguments: Sequence[str],
    *,
    output: Path,
    ends_with_parent: bool = False,
    environment: Mapping[str, str] | None = None,
    mark_is_last: bool = False,
) -> psutil.Process:
    """Start a program in ``folder`` with its output in the file ``output``. Raises ServiceError if it cannot be started.

    The mark is its first argument, or its last if ``mark_is_last``. With ``ends_with_parent`` the kernel kills it when this
    thread ends. ``environment`` is added to that of this process.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    marked = [*arguments, mark(folder, role)] if mark_is_last else [mark(folder, role), *arguments]
    try:
        with output.open("wb") as file:
            child = subprocess.Popen(
                [str(executable), *marked],
                cwd=folder,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is not for it
                preexec_fn=_end_with_parent if ends_with_parent and sys.platform == "linux" else None,
            )
    except OSError as error:
        raise ServiceError(f"{executable} cannot be started: {error.strerror}") from None
    _CHILDREN[child.pid] = child
    return psutil.Process(child.pid)


# Popen objects of this process's children. Waiting for them keeps them from becoming zombies.
_CHILDREN: dict[int, subprocess.Popen[bytes]] = {}

# loaded before the fork: between fork and exec, a program with threads may do little more than one call
_LIBC = ctypes.CDLL(None)


def _end_with_parent() -> None:
    _LIBC.prctl(_SET_PDEATHSIG, signal.SIGKILL)


def lives(process: psutil.Process) -> bool:
    """Return whether a process still runs."""
    if (child := _CHILDREN.get(process.pid)) is not None:
        return child.poll() is None
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def stop(process: psutil.Process, *, seconds: float) -> bool:
    """Ask a process to end, kill it after ``seconds`` (0: at once), and wait until it is gone. Return False if it was killed.

    Raises ServiceError if it remains after that.
    """
    with contextlib.suppress(psutil.Error):
        if seconds > 0:
            process.terminate()
    if seconds > 0 and _gone(process, seconds):
        return True
    with contextlib.suppress(psutil.Error):
        process.kill()
    if not _gone(process, 30):
        raise ServiceError(f"process {process.pid} does not end, not even killed", hint="the kernel holds it; look at its disk")
    return False


def _gone(process: psutil.Process, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while lives(process):
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
    _CHILDREN.pop(process.pid, None)
    return True


def wait_ready(process: psutil.Process, probe: Callable[[], str | None], *, seconds: float) -> str | None:
    """Call ``probe`` until it returns None (ready). Return what is missing if the process ends or the time is up first."""
    end = time.monotonic() + seconds
    while True:
        missing = probe()
        if missing is None:
            return None
        if not lives(process):
            return "its process ended"
        if time.monotonic() >= end:
            return f"not ready after {seconds:.0f} s: {missing}"
        time.sleep(0.2)


def cause(*logs: Path) -> str:
    """Return the last fault of the first log that names one, else the last line of the first log with lines, else an empty text."""
    rest = ""
    for log in logs:
        try:
            with log.open("rb") as file:
                file.seek(max(0, os.path.getsize(log) - _TAIL_BYTES))
                text, _, _ = file.read().decode("utf-8", "replace").partition(_GO_DUMP)
            lines = [line for line in text.splitlines() if not _NO_NEWS.match(line)]
        except OSError:
            continue
        faults = [line for line in lines if _FAULT.search(line)]
        if faults:
            return " ".join(faults[-1].split())[:_LONGEST_CAUSE]
        rest = rest or (" ".join(lines[-1].split())[:_LONGEST_CAUSE] if lines else "")
    return rest
