"""Describe input that a batch sets aside, unread: a landing file, or offsets of a topic. It counts as one rejected record."""

from __future__ import annotations

from dataclasses import dataclass

TOO_MANY_REJECTS = "too_many_rejects"
GZIP_BOMB = "gzip_bomb"
POISON = "poison"
QUARANTINE_REASONS = (TOO_MANY_REJECTS, GZIP_BOMB, POISON)


@dataclass(frozen=True)
class QuarantineLimits:
    """The limits above which a batch sets a landing file aside as a whole.

    More than ``rejects`` of its records are rejected and they are more than ``share`` of all; or it is a gzip file that unpacks to
    more than ``unpacked_bytes``, at more than ``gzip_ratio`` bytes a stored byte.
    """

    rejects: int
    share: float
    gzip_ratio: int
    unpacked_bytes: int = 1024**3

    def is_flood(self, rejected: int, offered: int) -> bool:
        """Return whether a file has too many rejects."""
        return rejected > self.rejects and rejected > self.share * offered


@dataclass(frozen=True)
class Quarantined:
    """A landing file (``name`` is its path in the landing folder; start and end are 0) or offsets [start, end) of a partition."""

    name: str
    reason: str
    cause: str  # explains the reason in a line
    start: int = 0
    end: int = 0

    def covers(self, name: str, start: int) -> bool:
        """Return whether this covers the split of ``name`` that begins at ``start``."""
        return self.name == name and (not self.end or self.start <= start < self.end)
