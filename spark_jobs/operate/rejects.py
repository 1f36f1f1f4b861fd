"""Reads the records that were rejected or conflict: their place, reasons and raw text, and the count of each reason."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from spark_jobs.config import Settings
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import REJECTED_TABLES

OLDER = "union all by name select null::bigint as records where false"
"""Append it to a select from either table: a table of an older adtally lacks column ``records`` until the next ingest adds it."""


@dataclass(frozen=True)
class ReasonCount:
    """Records of a stream that were rejected for one reason; a record with two reasons is in both."""

    stream: str
    reason: str
    records: int
    newest_at: datetime


@dataclass(frozen=True)
class Reject:
    """A row of `rejected_events` or `rejected_orders`. ``line`` is the offset in a topic, 0 for a whole file.

    ``records``: the number of records of the row; a row of more than one has no ``raw``. Only conflicts have fingerprints.
    """

    stream: str
    reasons: list[str]
    source: str
    region: str
    file: str
    line: int
    records: int
    record_id: str | None
    record_time: datetime | None
    ingested_at: datetime
    fingerprint: str | None
    accepted_fingerprint: str | None
    raw: str | None
    raw_encoding: str | None
    raw_size_bytes: int | None

    @property
    def place(self) -> str:
        """The file and line, or the topic's partition and offset, for people."""
        if self.source == "kafka":
            return f"{self.file}, offset {self.line}"
        more = " and others" if self.records > 1 else ""
        return f"{self.file}, line {self.line}{more}" if self.line else f"{self.file}, the whole file"


@dataclass(frozen=True)
class RejectReport:
    """The newest matching rows, the counts of all matching ones, and the number of matching records."""

    records: int
    counts: list[ReasonCount]
    rejects: list[Reject]


def counts_sql(table: str, stream: str) -> str:
    """Return a select of the fields of `ReasonCount` from a table or view of rejected records."""
    return (
        f"select '{stream}' as stream, reason, sum(coalesce(records, 1))::bigint as records, max(ingested_at) as newest_at "
        f"from (select unnest(reason_codes) as reason, records, ingested_at from {table}) group by reason"
    )


def read_rejects(
    settings: Settings, *, reason: str | None = None, since: datetime | None = None, file: str | None = None, limit: int = 20
) -> RejectReport:
    """Read the rejected records that match, the newest first. ``reason`` may be 'conflict'.

    ``since`` is a time of ingestion; ``file`` is part of a name. An ingest may run meanwhile.

    Raises TableCorruptionError if a table cannot be read.
    """
    lake = Lake(settings)
    snapshot = lake.pin(*REJECTED_TABLES.values())
    parts = [
        f"select '{stream}' as stream, * from {snapshot.scan(table)}"
        for stream, table in REJECTED_TABLES.items()
        if table in snapshot
    ]
    if not parts:
        return RejectReport(0, [], [])
    with lake.database() as database:
        # read once, so that the counts and the rows agree
        database.execute(
            f"""
            create temp table found as
            select *, coalesce(records, 1) as many
            from ({" union all by name ".join(parts)} {OLDER})
            where ($reason is null or list_contains(reason_codes, $reason)) and ($since is null or ingested_at >= $since)
                and ($file is null or contains(source_file, $file))
            """,
            {"reason": reason, "since": since, "file": file},
        )
        ((records,),) = database.execute("select coalesce(sum(many), 0)::bigint from found").fetchall()
        counts = " union all ".join(counts_sql(f"(from found where stream = '{stream}')", stream) for stream in REJECTED_TABLES)
        reasons = database.execute(f"from ({counts}) order by records desc, stream, reason").fetchall()
        newest = database.execute(_NEWEST, [limit]).fetchall()
    return RejectReport(records, [ReasonCount(*row) for row in reasons], [Reject(*row) for row in newest])


_NEWEST = """
select stream, reason_codes, source, region, source_file, source_line, many, record_id, record_time, ingested_at,
    fingerprint, accepted_fingerprint, raw, raw_encoding, raw_size_bytes
from found order by ingested_at desc, stream, source_file, source_line limit ?
"""
