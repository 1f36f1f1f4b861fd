"""A batch that fails for what is in it: how often it was tried, and which of its input makes it fail.

A batch that has failed so three times is taken apart: its files, or ranges of offsets, are tried in halves, down to the file or the
offset that fails by itself. That is set aside, and the rest of the batch is ingested.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spark_jobs.errors import AdtallyError
from spark_jobs.failure import failure_cause
from spark_jobs.ingest.files.landing import LandingFile
from spark_jobs.ingest.kafka.ranges import OffsetRange
from spark_jobs.lake.commit import Transaction

ATTEMPTS = 3
Unit = LandingFile | OffsetRange
# what a failure says that the records are not to blame for: a file, the disk, rights, the broker, a process that was told to end.
# What cannot be read of a landing file is no failure: it is a rejected record.
_OTHER_CAUSES = re.compile(
    r"errno \d+|\b(OSError|IOError|FileNotFoundError|FileExistsError|NotADirectoryError|IsADirectoryError|PermissionError)\b"
    r"|no space left|disk quota|permission denied|read-only file system|connection (refused|reset)|Py4JNetworkError"
    r"|answer from java side|cancelled|interrupted|shut ?down|stopped SparkContext|spark_jobs\.errors\.",
    flags=re.IGNORECASE,
)


def is_of_content(error: Exception) -> bool:
    """Whether a batch may have failed for its records: not for a cause that is known to be another one."""
    if isinstance(error, AdtallyError | OSError):
        return False
    text = str(error)
    last = text.rpartition("Traceback (most recent call last):")[2]
    return _OTHER_CAUSES.search(last or text) is None and _OTHER_CAUSES.search(str(failure_cause(error))) is None


@dataclass
class Attempts:
    """How often a batch was begun, in a file of the home, so that a process that dies of it is counted too.

    ``probing`` is what is being tried by itself; ``deaths`` counts, by what was tried, the processes that ended meanwhile. The file
    is not synced: a count that is lost costs further attempts, nothing else.
    """

    path: Path
    transaction: Transaction
    count: int = 0
    probing: str | None = None
    deaths: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, transaction: Transaction) -> Attempts:
        """The attempts of a batch so far; none where the file is of another batch, or cannot be read."""
        made = cls(path, transaction)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads(path.read_text("utf-8"))
            if (stored["query_id"], stored["batch_id"]) == (transaction.query_id, transaction.batch_id):
                made.count, made.deaths = int(stored["count"]), dict(stored["deaths"])
                if stored["probing"]:
                    made.deaths[stored["probing"]] = made.deaths.get(stored["probing"], 0) + 1
        return made

    def begin(self) -> None:
        """Count one more attempt."""
        self.count += 1
        self._write()

    @contextlib.contextmanager
    def probe(self, units: Sequence[Unit]) -> Iterator[int]:
        """While some of the batch is tried by itself; yields how many processes have died of just that."""
        name = _name(units)
        self.probing = name
        self._write()
        yield self.deaths.get(name, 0)
        self.probing = None
        self._write()

    def _write(self) -> None:
        stored = {
            "query_id": self.transaction.query_id,
            "batch_id": self.transaction.batch_id,
            "count": self.count,
            "probing": self.probing,
            "deaths": self.deaths,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps(stored), "utf-8")
        os.replace(temporary, self.path)  # not synced: it outlives the process, and each batch would pay for a power cut


def _name(units: Sequence[Unit]) -> str:
    first, last = (f"{u.name}:{u.start}-{u.end}" if isinstance(u, OffsetRange) else u.path for u in (units[0], units[-1]))
    return first if len(units) == 1 else f"{first} to {last}"


def find_poison(
    units: Sequence[Unit], attempts: Attempts, failure_of: Callable[[Sequence[Unit]], str | None]
) -> list[tuple[Unit, str]]:
    """The units that fail by themselves, each with its cause. ``failure_of`` tries some by themselves; returns what they fail by.

    What killed the process is not tried again: several units at once are then halved, a single one is poison after the third time.
    """
    if not units:
        return []
    cause: str | None
    with attempts.probe(units) as deaths:
        if deaths >= (1 if _can_be_halved(units) else ATTEMPTS):
            cause = f"the process ended {deaths} times while it read it"
        else:
            cause = failure_of(units)
    if cause is None:
        return []
    if not _can_be_halved(units):
        return [(units[0], cause)]
    halves = _halves(units)
    found = [one for half in halves for one in find_poison(half, attempts, failure_of)]
    # a range that fails as a whole only is poison as a whole; files that do are left together
    return found or ([(units[0], cause)] if len(units) == 1 else [])


def _can_be_halved(units: Sequence[Unit]) -> bool:
    return len(units) > 1 or (isinstance(units[0], OffsetRange) and units[0].end - units[0].start > 1)


def _halves(units: Sequence[Unit]) -> tuple[Sequence[Unit], Sequence[Unit]]:
    if len(units) > 1:
        middle = len(units) // 2
        return units[:middle], units[middle:]
    one = units[0]
    assert isinstance(one, OffsetRange)
    middle = (one.start + one.end) // 2
    return [OffsetRange(one.name, one.start, middle)], [OffsetRange(one.name, middle, one.end)]
