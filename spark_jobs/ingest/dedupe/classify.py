"""Find which records of a batch are new, duplicates or conflicts. A pure function of arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from spark_jobs.ingest.dedupe.keys import Keys, Words


class Outcome(IntEnum):
    """The outcome of a valid record."""

    ACCEPTED = 0
    DUPLICATE = 1
    CONFLICT = 2


# (low, high) sorted by (low, high) -> found in the history, fingerprint of the accepted record there (0 where not found)
Lookup = Callable[[Words, Words], tuple[npt.NDArray[np.bool_], Words]]


@dataclass(frozen=True)
class Classification:
    """The outcome of each record (Outcome as int8) and, for conflicts at least, the fingerprint of the accepted record."""

    outcome: npt.NDArray[np.int8]
    accepted_fingerprint: Words


def classify(keys: Keys, lookup: Lookup) -> Classification:
    """Accept the first record of an id, in history or batch. A later one is a duplicate (same fingerprint) or a conflict."""
    count = len(keys)
    if count == 0:
        return Classification(np.empty(0, dtype=np.int8), np.empty(0, dtype=np.uint64))
    order = keys.order
    low, high, fingerprint = keys.low[order], keys.high[order], keys.fingerprint[order]
    first = np.ones(count, dtype=bool)
    first[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    heads = np.flatnonzero(first)
    found, known = lookup(low[heads], high[heads])
    holder = np.where(found, known, fingerprint[heads])
    group = np.cumsum(first) - 1
    holder_of_record = holder[group]
    accepted = first & ~found[group]
    outcome_sorted = np.where(
        accepted, Outcome.ACCEPTED, np.where(fingerprint == holder_of_record, Outcome.DUPLICATE, Outcome.CONFLICT)
    ).astype(np.int8)
    outcome = np.empty(count, dtype=np.int8)
    outcome[order] = outcome_sorted
    accepted_fingerprint = np.empty(count, dtype=np.uint64)
    accepted_fingerprint[order] = holder_of_record
    return Classification(outcome, accepted_fingerprint)


def accepted_keys(keys: Keys, classified: Classification) -> Keys:
    """Return the keys that are accepted, sorted."""
    order = keys.order  # already computed by classify
    return keys.take(order[(classified.outcome == Outcome.ACCEPTED)[order]])
