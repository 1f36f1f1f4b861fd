"""List quarantined input, and release a quarantined file so that the ingest reads it again.

A released file gets a second name in the landing folder, under which the ingest reads it as a new file. Records of it that were
accepted before count as duplicates. The rejected row of the quarantine stays; table `releases` records the release.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.config import Settings
from spark_jobs.disk import replacing, sync_folder
from spark_jobs.errors import UsageError
from spark_jobs.ingest.quarantine import QUARANTINE_REASONS
from spark_jobs.lake.acts import Act, act_info, complete_audit_log
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.landing_view import landed_object, refresh_landing
from spark_jobs.lake.reading import read_batches
from spark_jobs.lake.tables import REJECTED_TABLES, RELEASES
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.steps import Step

_COLUMNS = ("source", "source_file", "source_line", "reason_codes", "raw", "ingested_at", "_query_id", "_batch_id")


@dataclass(frozen=True)
class Quarantine:
    """A file, or offsets of a topic from ``first_offset`` on, that a batch did not read, and why."""

    stream: str
    source_file: str
    first_offset: int | None
    reason: str
    cause: str
    quarantined_at: datetime
    query_id: str
    batch_id: int
    released_as: str | None = None


def read_quarantine(settings: Settings) -> list[Quarantine]:
    """Return all quarantined input, the oldest first; ``released_as`` is the name under which the ingest reads it again."""
    lake = Lake(settings)
    released = {
        (row["source_file"], row["_query_id"], row["_batch_id"]): row["released_as"]
        for row in lake.pin(RELEASES).rows(RELEASES).to_pylist()
    }
    found = []
    for stream, table in REJECTED_TABLES.items():
        snapshot = lake.pin(table)
        paths = [file.path for file in snapshot.files(table)] if table in snapshot else []
        schema = pa.schema([table.schema.field(name) for name in _COLUMNS])
        for batch in read_batches(lake.uri(table), paths, schema):  # batch by batch, because column raw may be large
            text = pc.binary_join(batch["reason_codes"], ",")  # a quarantined file has no other reason
            for row in batch.filter(pc.is_in(text, value_set=pa.array(QUARANTINE_REASONS))).to_pylist():
                file, batch_key = row["source_file"], (row["_query_id"], row["_batch_id"])
                offset = row["source_line"] if row["source"] == "kafka" else None
                reason, cause, at = row["reason_codes"][0], row["raw"] or "", row["ingested_at"]
                found.append(Quarantine(stream, file, offset, reason, cause, at, *batch_key, released.get((file, *batch_key))))
    return sorted(found, key=lambda one: (one.quarantined_at, one.source_file, one.first_offset or 0))


def release_file(settings: Settings, name: str, *, reason: str, released_by: str) -> str:
    """Let the next ingest read a quarantined file; return the file's new name. Safe to run again.

    Raises UsageError if the file is not quarantined, is already released, or no longer exists.
    """
    if not reason.strip() or not released_by.strip():
        raise UsageError("a reason and a name are needed: both are kept", hint="--reason …")
    ensure_tables(settings)
    known = [one for one in read_quarantine(settings) if one.source_file == name]
    if not known:
        raise UsageError(f"{name} is not quarantined", hint="adtally release --list shows what is")
    if any(one.first_offset is not None for one in known):
        raise UsageError(
            f"{name} is a partition of a topic", hint="send its records to the topic again; docs/runbooks/quarantine.md"
        )
    waiting = [one for one in known if one.released_as is None]
    if not waiting:
        raise UsageError(f"{name} is released already, as {known[-1].released_as}", hint="adtally ingest reads it")
    one = waiting[-1]
    refresh_landing(settings, is_full=True)
    path = settings.landing_path / name
    if not path.is_file() or path.is_symlink():
        raise UsageError(
            f"{settings.landing_uri}/{name} is not there any more",
            hint="land the file again under another name: it is then a new file",
        )
    ending = ".jsonl.gz" if path.name.endswith(".jsonl.gz") else ".jsonl"
    released = f"{path.name.removesuffix(ending)}.released-{one.query_id[:8]}-{one.batch_id}{ending}"  # no other release has it
    stored = landed_object(f"{settings.landing_uri}/{name}")
    if stored is None:
        _link(path, path.with_name(released))
    else:
        stored.copy(released)
    now = datetime.now(UTC)
    row = {
        "stream": one.stream,
        "source_file": name,
        "released_as": f"{name.rpartition('/')[0]}/{released}",
        "quarantine_reason": one.reason,
        "reason": reason.strip(),
        "released_by": released_by.strip(),
        "released_at": now,
        "_query_id": one.query_id,
        "_batch_id": one.batch_id,
    }
    # if a run was killed after the link, the next run completes it: the transaction commits the row once
    transaction = Transaction(f"release {one.query_id} {name}", one.batch_id)
    arguments = {"file": name, "released_as": row["released_as"], "quarantine_reason": one.reason}
    info = act_info(Act.RELEASE, reason=reason.strip(), arguments=arguments, now=now, by=released_by.strip())
    rows = pa.Table.from_pylist([row], RELEASES.schema)
    Lake(settings).append(RELEASES, rows, Step.RELEASES, transaction=transaction, info=info)
    complete_audit_log(settings)
    return str(row["released_as"])


def _link(path: Path, target: Path) -> None:
    """Give a file a second name, or copy it if the file system has no links."""
    try:
        os.link(path, target)
        sync_folder(target.parent)
    except FileExistsError:
        return
    except OSError:
        with replacing(target) as temporary:
            shutil.copyfile(path, temporary)
