"""What must be true of a home after the steps so far, in plain Python: which files were read, in which order, and how often."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from services.simulator.chaos import oracle
from services.simulator.chaos.oracle import Books, Landed

NOW = datetime(2026, 1, 1, tzinfo=UTC)  # stands in for any time of ingestion: no record's fate depends on it


class Model:
    """Knows what landed and what an ingest has certainly read. Knows nothing of batches: their cut changes no total.

    Files are read in the order of their times of modification. A later file has a later time, unless all files before are known to
    be read: only then may the clock jump.
    """

    def __init__(self, campaigns: str, first_ms: int) -> None:
        self._campaigns = campaigns
        self._read: list[list[Landed]] = []  # by each ingest that ended
        self._waiting: list[Landed] = []
        self._forgotten = False  # the checkpoint is lost: the next ingest reads everything again
        self._books: dict[bool, Books] = {}
        self.clock_ms = first_ms
        self.readings = 1  # how often a record may have been read
        self.is_begun = False  # an ingest was interrupted, so a batch may be half committed
        self.counts_offered = True  # whether it is known how often each record was offered
        self.is_reviewed = True  # whether all marks of invalid traffic are known
        self.is_correcting = False  # a correction was interrupted, so its tables may contradict each other
        self.needs_repair = False  # a half committed batch lost its checkpoint: only a repair can finish it
        self.is_torn = False  # after a power cut: the newest commit of a table may have to be set aside by an ingest
        self.is_corrected = False  # a repair may have added increments under names of its own
        self.tokens: dict[str, str] = {}  # of people who were erased, by their ids
        self.marts_differ = False  # published marts may have been built from a file that was damaged since

    def land(self, files: Iterable[Landed]) -> None:
        """Note that files landed."""
        for file in files:
            self._waiting.append(file)
            self.clock_ms = max(self.clock_ms, file.modified_ms + 1000)
        self._books.clear()

    @property
    def has_read_all(self) -> bool:
        """Whether an ingest has certainly read all that landed."""
        return not self._waiting and not self._forgotten and not self.is_begun

    def move_clock(self, to_ms: int) -> None:
        """Let later files have times from ``to_ms`` on, if all earlier ones are read; else only forwards."""
        if self.has_read_all or to_ms > self.clock_ms:
            self.clock_ms = to_ms

    def begin_ingest(self) -> None:
        """Note that an ingest was interrupted: what waits may be read in part."""
        self.is_begun = True
        self.is_reviewed = False
        self._books.clear()

    def end_ingest(self) -> None:
        """Note that an ingest has read all that waits."""
        if self._waiting or self._forgotten:
            again = [file for run in self._read for file in run] if self._forgotten else []
            self._read.append([*again, *self._waiting])
            self._waiting = []
            self.is_reviewed = False
        self._forgotten = self.is_begun = self.is_torn = False
        self._books.clear()

    def forget(self) -> None:
        """Note that the checkpoint is lost."""
        self.readings += 1
        if self.is_begun:
            self.counts_offered = False
            self.needs_repair = True
        self._forgotten = True
        self._books.clear()

    def books(self, *, waiting: bool = False) -> Books:
        """Return the books of what is certainly read; with ``waiting`` also of what may have been read by now."""
        if waiting not in self._books:
            runs = [*self._read, self._waiting] if waiting else self._read
            books = oracle.account(runs, self._campaigns, NOW)
            if self.is_reviewed:
                oracle.review(books)
            books.erase(self.tokens)
            self._books[waiting] = books
        return self._books[waiting]

    def erase(self, user_id: str, token: str) -> None:
        """Note that a person was erased."""
        self.tokens[user_id] = token
        self._books.clear()

    def forget_books(self) -> None:
        """Compute the books anew: what is known of the marks has changed."""
        self._books.clear()

    def reviewed(self) -> None:
        """Note that a review of all hours has ended."""
        self.is_reviewed = not self._waiting and not self.is_begun
        self._books.clear()
