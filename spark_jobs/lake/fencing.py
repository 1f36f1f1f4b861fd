"""Fences tables against processes that have lost their leases.

Each commit made under leases has, for each, Delta's transaction identifier ``fence:<lease>`` with the token of the lease as its
version. A process commits nothing to a table that has a larger token than its own. Whoever takes over a lease that was not
released first commits its token to every table (`commit.commit_fence`). Then the version that an earlier holder was about to commit
is taken, and Delta refuses a concurrent commit with the same identifier.
"""

from __future__ import annotations

from deltalake import DeltaTable

from spark_jobs.lake.leases import Lease, held_leases
from spark_jobs.lake.log import FENCE
from spark_jobs.lake.transactions import newest_transaction


def check_leases(lakehouse: str, *, renews: bool = True) -> None:
    """Return if this process still holds its leases of a lakehouse. Renews those that may have expired.

    ``renews`` False: asks nobody, for who waits; the background renewal learns of a lost lease in time. Raises LeaseLostError.
    """
    for lease in held_leases(lakehouse):
        lease.check(renews=renews)


def mark_leases_dirty(uri: str) -> None:
    """Make the next holders of the leases fence the tables: a commit to the table at ``uri`` may still take effect."""
    for lease in _leases_of(uri):
        lease.mark_dirty()


def fences(uri: str, held: DeltaTable) -> dict[str, int]:
    """Return the fences of a commit to the table at ``uri``, built on ``held``: versions of transactions by app id.

    Raises LeaseLostError if another process has taken over one of the leases.
    """
    found: dict[str, int] = {}
    for lease in _leases_of(uri):
        lease.check()
        name, token = FENCE + lease.name, lease.token
        if token is None:  # another thread, which needed it for its own work, has just released it
            continue
        newest = newest_transaction(uri, held, name)
        if newest is not None and newest > token:
            raise lease.lose(lease.describe() or "another process")
        found[name] = token
    return found


def _leases_of(uri: str) -> list[Lease]:
    return held_leases(uri.rsplit("/", 1)[0])
