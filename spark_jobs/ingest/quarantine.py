"""Input that a batch sets aside, unread: a landing file, or offsets of a topic. It counts as one rejected record with a reason."""

from __future__ import annotations

from dataclasses import dataclass

TOO_MANY_REJECTS = "too_many_rejects"
GZIP_BOMB = "gzip_bomb"
POISON = "poison"
QUARANTINE_REASONS = (TOO_MANY_REJECTS, GZIP_BOMB, POISON)


@dataclass(frozen=True)
class QuarantineLimits:
    """When a landing file is set aside as a whole.

    More than ``rejects`` of its records are rejected and they are more than ``share`` of all; or it is a gzip file of which more
    than ``unpacked_bytes`` were unpacked, at more than ``gzip_ratio`` bytes a stored byte.
    """

    rejects: int
    share: float
    gzip_ratio: int
    unpacked_bytes: int = 1024**3

    def is_flood(self, rejected: int, offered: int) -> bool:
        """Whether so many rejects set a file aside."""
        return rejected > self.rejects and rejected > self.share * offered


@dataclass(frozen=True)
class Quarantined:
    """A landing file (``name`` is its path under the landing folder; start and end are 0) or offsets [start, end) of a partition.

    ``cause`` says in a line what was found.
    """

    name: str
    reason: str
    cause: str
    start: int = 0
    end: int = 0

    def covers(self, name: str, start: int) -> bool:
        """Whether the split of ``name`` that begins at ``start`` is set aside."""
        return self.name == name and (not self.end or self.start <= start < self.end)
