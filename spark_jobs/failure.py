"""Finds the cause of a failure and formats it on one line: the cause, where it happened, what to do.

A Spark task fails in a Python worker. Its exception reaches the driver as text: the worker's traceback, often inside a Java stack
trace. The cause is the last line of that traceback.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spark_jobs.errors import AdtallyError
from spark_jobs.texts import printable

MESSAGE_LENGTH = 600  # of an error that a user sees

_ROOT = Path(__file__).resolve().parents[1]
_TRACEBACK = "Traceback (most recent call last):"
_PLACE = "adtally was working on "
_FRAME = re.compile(r'^\s+File "(?P<path>.+)", line (?P<line>\d+), in ')
_RAISED = re.compile(r"^(?P<kind>[A-Za-z_][\w.$]*)(?:: (?P<message>.*))?$", flags=re.DOTALL)
_JAVA_CAUSE = re.compile(r"^\s*(?:Caused by: |: )(?P<cause>\S.*)$")
_OUR_ERRORS = "spark_jobs.errors."

# (pattern of a cause, what to do); the first match counts
_HINTS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, flags=re.IGNORECASE), hint)
    for pattern, hint in (
        (r"no space left|disk quota exceeded|errno 28\b|errno 122\b", "free some disk space: docs/runbooks/disk-space.md"),
        (
            r"MemoryError|OutOfMemory|out of memory|cannot allocate memory|malloc of size|worker exited unexpectedly",
            "the machine may be short of memory: a smaller ADTALLY_MAX_BYTES_PER_BATCH or ADTALLY_DRIVER_MEMORY helps; "
            "docs/runbooks/ingest-restarts.md",
        ),
        (r"permission denied|PermissionError|read-only file system|operation not permitted", "let this user read and write there"),
        (r"too many open files", "raise the limit of open files (ulimit -n)"),
        (r"input/output error|errno 5\b", "the disk may be failing: look at the kernel's log"),
    )
)


@dataclass(frozen=True)
class FailureCause:
    """``text``: the error's kind and message. ``work``: the task's input. ``code``: our file and line. ``hint``: what to do."""

    text: str
    work: str | None = None
    code: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        places = [f"while working on {self.work}" if self.work else "", f"at {self.code}" if self.code else ""]
        return one_line(f"{self.text} {' '.join(filter(None, places))}", 400)


@contextmanager
def working_on(work: object) -> Iterator[None]:
    """Add the name of the input to an exception: the driver gets only the text of a worker's exception. The innermost counts."""
    try:
        yield
    except Exception as error:
        if not any(note.startswith(_PLACE) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{_PLACE}{work}")
        raise


def failure_cause(error: BaseException) -> FailureCause:
    """Return the cause of a Python error, or of an error with which Spark reports a failed task."""
    if isinstance(error, AdtallyError):
        return FailureCause(error.args[0], hint=error.hint)
    text = _text_of(error)
    if _TRACEBACK in text:
        return _parse_traceback(text)
    if "\n\tat " in text or "JVM stacktrace" in text:
        return _with_hint(_java_cause(text))
    return _parse_traceback("".join(traceback.format_exception(type(error), error, error.__traceback__, chain=False)))


def one_line(text: object, limit: int = 300) -> str:
    """Return a text on one line; if it is too long, its beginning and its end, for either may name the cause."""
    line = printable(" ".join(str(text).split()))
    if len(line) <= limit:
        return line
    tail = limit // 3
    return f"{line[: limit - tail - 5]} ... {line[-tail:]}"


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # the error is Java's, and Java has ended
        return f"{type(error).__name__}: {' '.join(map(repr, error.args))}"


def _parse_traceback(text: str) -> FailureCause:
    """Return the cause at the end of the last traceback of ``text``."""
    lines = text[text.rindex(_TRACEBACK) :].splitlines()[1:] if _TRACEBACK in text else text.splitlines()
    code = None
    raised: list[str] = []
    work = None
    for line in lines:
        frame = None if raised else _FRAME.match(line)
        if frame is not None:
            code = _own_place(frame["path"], frame["line"]) or code
        elif line.startswith(_PLACE):
            work = line.removeprefix(_PLACE)
        elif line.startswith(("\tat ", "JVM stacktrace:")) or (raised and not line.strip()):
            break
        elif raised or (line.strip() and not line[0].isspace()):
            raised.append(line)
    return _with_hint(_short("\n".join(raised)) or "no message", work, code)


def _own_place(path: str, line: str) -> str | None:
    """Return file and line of a frame in the project's code, as in spark_jobs/ingest/write.py:91; None for other code."""
    relative = os.path.relpath(path, _ROOT)
    return f"{relative}:{line}" if relative.startswith(("spark_jobs/", "orchestration/", "expectations/")) else None


def _java_cause(text: str) -> str:
    """Return the innermost of Java's causes that has a message; else the first line."""
    causes = [match["cause"] for match in map(_JAVA_CAUSE.match, text.splitlines()) if match is not None]
    with_message = [cause for cause in causes if ": " in cause]
    return _short([*text.strip().splitlines()[:1], *causes[-1:], *with_message[-1:]][-1])


def _short(raised: str) -> str:
    """Return an exception's line without the packages of its class; of our own errors only the message."""
    match = _RAISED.match(raised)
    if match is None:
        return raised
    kind, message = match["kind"], match["message"]
    if kind.startswith(_OUR_ERRORS) and message:
        return message
    name = kind.rpartition(".")[2]
    return f"{name}: {message}" if message else name


def _with_hint(text: str, work: str | None = None, code: str | None = None) -> FailureCause:
    hint = next((hint for pattern, hint in _HINTS if pattern.search(text)), None)
    return FailureCause(text, work, code, hint)
