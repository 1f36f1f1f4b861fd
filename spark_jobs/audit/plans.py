"""Read the plans of batches from the commits of `events` or `orders`: files or offset ranges in order, limits, prices.

Delta deletes old commits after a while, so a catalogue stores the plans. The catalogue is derived data: if it is missing, the plans
are read again from the remaining commits, and a batch without a plan gets one from its rows (``Inputs.lost``).
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import DeltaLog, commit_identity
from spark_jobs.lake.tables import EVENTS, Table

_FORMAT = 4
LIMITS = ("ingested_us", "earliest_us", "future_skew_us", "hour_grace_us")
"""The fields of a plan that bound the times of its records."""


class PlannedFile(msgspec.Struct, frozen=True, array_like=True, order=True):
    """A landing file in the state that its batch was planned with. A batch reads its files in the order of (modified_ms, name)."""

    modified_ms: int
    name: str
    size: int


class PlannedRange(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Offsets [start, end) of a Kafka partition. ``name`` is ``kafka/<cluster>/<topic>/<partition>``, as in the tables.

    Not every offset has a record. A batch reads its ranges in the order of (name, start).
    """

    name: str
    start: int
    end: int


class SetAside(msgspec.Struct, frozen=True, array_like=True):
    """A file that a batch did not read (start and end are 0), or offsets [start, end) of a partition: one rejected record.

    ``name`` is as in the tables; ``cause`` is one line that says why.
    """

    name: str
    reason: str
    cause: str
    start: int = 0
    end: int = 0


class BatchPlan(msgspec.Struct, frozen=True, array_like=True):
    """The plan of a batch. ``version`` is the version of `events` or `orders` that the batch wrote, and orders the batches.

    - Times are microseconds since the epoch, durations microseconds.
    - ``files`` and ``ranges`` are in the order of their records. A batch has one or the other.
    - ``rule_set`` names the rules of invalid traffic (None: no rule).
    - ``rejects_kept`` is how many rejected records with the same reasons and hour, per file or partition, have rows of their own
      (None: all).
    - ``set_aside`` was not read.
    """

    query_id: str
    batch_id: int
    version: int
    ingested_us: int
    earliest_us: int
    future_skew_us: int
    hour_grace_us: int
    campaigns_version: int
    files: tuple[PlannedFile, ...]
    rule_set: str | None = None
    ranges: tuple[PlannedRange, ...] = ()
    rejects_kept: int | None = None
    set_aside: tuple[SetAside, ...] = ()

    def is_set_aside(self, name: str) -> bool:
        """Return whether the batch left a whole file unread."""
        return any(one.name == name and not one.end for one in self.set_aside)


class _Catalogue(msgspec.Struct):
    """Plans up to ``version``. ``commit`` identifies its commit: after a power cut another commit may get the same version."""

    format: int
    table_id: str
    version: int
    commit: str
    plans: list[BatchPlan]


class _StoredLimits(msgspec.Struct):
    ingested_us: int
    earliest_us: int
    future_skew_us: int
    hour_grace_us: int
    rejects_kept: int | None = None


class _StoredPlan(msgspec.Struct):
    """A plan as the user metadata of a commit stores it."""

    query_id: str
    batch_id: int
    limits: _StoredLimits
    campaigns_version: int
    files: list[tuple[int, str, int]] = []
    rule_set: str | None = None
    ranges: list[tuple[str, int, int]] = []
    quarantined: list[SetAside] = []


def read_plans(settings: Settings, version: int, table: Table = EVENTS) -> list[BatchPlan]:
    """Return the plans of all commits of ``table`` (`events` or `orders`) up to ``version``, in their order, each batch once."""
    log = Lake(settings).log(table)
    path = settings.recount_path / ("plans.json" if table is EVENTS else f"plans-{table.name}.json")
    table_id = log.table_id()
    catalogue = _load(path, log, table_id)
    if catalogue.version < version:
        found = [plan for number in range(catalogue.version + 1, version + 1) if (plan := _plan_of(log, number))]
        catalogue = _Catalogue(_FORMAT, table_id, version, commit_identity(log.commit(version)), [*catalogue.plans, *found])
        disk.write_file(path, msgspec.json.encode(catalogue))
    first: dict[tuple[str, int], BatchPlan] = {}
    for plan in catalogue.plans:
        if plan.version <= version:
            first.setdefault((plan.query_id, plan.batch_id), plan)
    return list(first.values())


def _plan_of(log: DeltaLog, version: int) -> BatchPlan | None:
    commit = log.commit(version)
    if commit is None or commit.user_metadata is None:
        return None
    try:
        stored = msgspec.json.decode(commit.user_metadata, type=_StoredPlan)
    except msgspec.MsgspecError:
        return None  # a commit of a compaction, a correction or another tool
    return BatchPlan(
        query_id=stored.query_id,
        batch_id=stored.batch_id,
        version=version,
        campaigns_version=stored.campaigns_version,
        files=tuple(sorted(PlannedFile(ms, landing_name(path), size) for ms, path, size in stored.files)),
        rule_set=stored.rule_set,
        ranges=tuple(sorted(PlannedRange(*span) for span in stored.ranges)),
        set_aside=tuple(stored.quarantined),
        **msgspec.structs.asdict(stored.limits),
    )


def landing_name(path: str) -> str:
    """Return the name of a planned file under the landing folder: the last three parts, whatever the folder's path was."""
    return "/".join(Path(path).parts[-3:])


def _load(path: Path, log: DeltaLog, table_id: str) -> _Catalogue:
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=_Catalogue)
        is_current = commit_identity(log.commit(stored.version)) in (stored.commit, "")  # empty: Delta has deleted the commit
        is_known = stored.version <= (log.latest_version() or 0)
        if (stored.format, stored.table_id) == (_FORMAT, table_id) and is_current and is_known:
            return stored
    except (OSError, msgspec.MsgspecError):
        pass  # missing or damaged: the commits are read again
    return _Catalogue(_FORMAT, table_id, -1, "", [])
