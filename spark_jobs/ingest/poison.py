"""Find the input that makes a batch fail, and count how often the batch was tried.

After three such failures the job tries the batch's files, or ranges of offsets, in halves, down to the file or the offset that
fails alone. The job sets that aside and ingests the rest of the batch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from spark_jobs.errors import AdtallyError
from spark_jobs.failure import failure_cause
from spark_jobs.ingest.files.landing import LandingFile
from spark_jobs.ingest.kafka.ranges import OffsetRange
from spark_jobs.lake.commit import Transaction

ATTEMPTS = 3
Unit = LandingFile | OffsetRange
# messages of failures that no record causes: a file, the disk, rights, the broker, a process that was asked to end.
# An unreadable landing file causes no failure: it is a rejected record.
_OTHER_CAUSES = re.compile(
    r"errno \d+|\b(OSError|IOError|FileNotFoundError|FileExistsError|NotADirectoryError|IsADirectoryError|PermissionError)\b"
    r"|no space left|disk quota|permission denied|read-only file system|connection (refused|reset)|Py4JNetworkError"
    r"|answer from java side|cancelled|interrupted|shut ?down|stopped SparkContext|spark_jobs\.errors\.",
    flags=re.IGNORECASE,
)


def is_of_content(error: Exception) -> bool:
    """Return whether its records may have made a batch fail: no other cause is known."""
    if isinstance(error, AdtallyError | OSError):
        return False
    text = str(error)
    last = text.rpartition("Traceback (most recent call last):")[2]
    return _OTHER_CAUSES.search(last or text) is None and _OTHER_CAUSES.search(str(failure_cause(error))) is None


@dataclass
class Attempts:
    """Counts the attempts of a batch in a file of the home, so that an attempt that kills the process counts too.

    ``probing`` names the units that are tried alone; ``deaths`` counts, by such a name, the processes that ended meanwhile. A
    power cut may lose the file, which costs only further attempts.
    """

    path: Path
    transaction: Transaction
    count: int = 0
    probing: str | None = None
    deaths: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, transaction: Transaction) -> Attempts:
        """Read the attempts of a batch; none if the file is of another batch, or unreadable."""
        made = cls(path, transaction)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads(path.read_text("utf-8"))
            if Transaction(stored["query_id"], stored["batch_id"]) == transaction:
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
        """Record that the block tries some units alone; yield how many processes ended while they tried the same ones."""
        name = _name(units)
        self.probing = name
        self._write()
        yield self.deaths.get(name, 0)
        self.probing = None
        self._write()

    def _write(self) -> None:
        stored = {**asdict(self.transaction), "count": self.count, "probing": self.probing, "deaths": self.deaths}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps(stored), "utf-8")
        os.replace(temporary, self.path)  # not synced, because each batch would pay for it; the file outlives the process


def _name(units: Sequence[Unit]) -> str:
    first, last = (f"{u.name}:{u.start}-{u.end}" if isinstance(u, OffsetRange) else u.path for u in (units[0], units[-1]))
    return first if len(units) == 1 else f"{first} to {last}"


def find_poison(
    units: Sequence[Unit], attempts: Attempts, failure_of: Callable[[Sequence[Unit]], str | None]
) -> list[tuple[Unit, str]]:
    """Return the units that fail alone, each with its cause. ``failure_of`` tries units and returns the cause of their failure.

    Units that ended the process are not tried again: several units are halved at once, a single one is poison after three times.
    """
    if not units:
        return []
    first = units[0]
    is_large_range = isinstance(first, OffsetRange) and first.end - first.start > 1
    can_be_halved = len(units) > 1 or is_large_range
    with attempts.probe(units) as deaths:
        is_deadly = deaths >= (1 if can_be_halved else ATTEMPTS)
        cause = f"the process ended {deaths} times while it read it" if is_deadly else failure_of(units)
    if cause is None:
        return []
    if not can_be_halved:
        return [(first, cause)]
    middle = len(units) // 2
    halves = [units[:middle], units[middle:]]
    if isinstance(first, OffsetRange) and len(units) == 1:
        middle = (first.start + first.end) // 2
        halves = [[OffsetRange(first.name, first.start, middle)], [OffsetRange(first.name, middle, first.end)]]
    found = [one for half in halves for one in find_poison(half, attempts, failure_of)]
    # a range that fails only as a whole is poison as a whole; several files that fail only together are left together
    return found or ([(first, cause)] if len(units) == 1 else [])
