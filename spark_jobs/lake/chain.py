"""Writes hash-chained tables: each row has the hash of its content and of the row before it (docs/tamper-evidence.md).

The hash of a row is the SHA-256, in hex, of a JSON text: ``{"chain": <table>, "previous": <hash of the row before>, "row":
{column: value}}``, UTF-8, with sorted keys, without spaces, only what JSON must escape escaped. A date is ``2025-06-02``, a time
``2025-06-02T10:05:00.000000Z``, a number a whole number. A column without a value and the columns of the chain are left out, so a
column that a later release adds changes no hash. The row before the first one has 64 zeros as its hash.

The auditor has a reader of its own (`audit/chain.py`), which imports nothing from here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
from deltalake.exceptions import CommitFailedError

from spark_jobs.errors import TableCorruptionError
from spark_jobs.lake.commit import Attempts, Transaction
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.locks import REWRITE, exclusive
from spark_jobs.lake.tables import BILLING_LINES, CHAIN_COLUMNS, HOUR_CLOSINGS, Table
from spark_jobs.steps import Step

Row = dict[str, Any]
"""A row of a chained table, without the columns of the chain."""

_APP = "adtally-chain"  # a transaction of a chained table has the position of the last row that it adds
_METADATA = "chain"
_ORDER = {BILLING_LINES.name: "posting", HOUR_CLOSINGS.name: "closed_at"}
"""By which column rows of an older adtally get their places; the rows of one posting stay in their order."""


@dataclass(frozen=True)
class Head:
    """The last row of a chain: its position (0: the chain is empty) and its hash."""

    position: int = 0
    hash: str = "0" * 64


def row_hash(table: str, previous: str, row: Mapping[str, object]) -> str:
    """Return the hash of a row in the chain of ``table``, after the row with the hash ``previous``."""
    content = {name: _plain(value) for name, value in row.items() if value is not None and name not in CHAIN_COLUMNS}
    text = {"chain": table, "previous": previous, "row": content}
    return hashlib.sha256(json.dumps(text, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    if isinstance(value, date):
        return value.isoformat()
    return value if isinstance(value, str) else int(value)  # type: ignore[call-overload]  # a whole number, also as Decimal


def link(table: Table, head: Head, rows: Sequence[Row]) -> tuple[pa.Table, Head]:
    """Return ``rows`` with their places after ``head``, as rows of ``table``, and the new head."""
    linked = []
    for row in rows:
        own = row_hash(table.name, head.hash, row)
        linked.append({**row, **dict(zip(CHAIN_COLUMNS, (head.position + 1, head.hash, own), strict=True))})
        head = Head(head.position + 1, own)
    return pa.Table.from_pylist(linked, table.schema), head


def head_metadata(head: Head, **facts: int) -> dict[str, object]:
    """Return what a commit that sets the head of a chain notes in its metadata, with further ``facts`` of it."""
    return {_METADATA: {"position": head.position, "hash": head.hash, **facts}}


def relink(table: Table, before: pa.Table, after: pa.Table) -> tuple[pa.Table, Head]:
    """Return all rows of a chain with the hashes of their new content, and the new head.

    ``before`` and ``after`` are the rows in the order of the chain. Those before the first that differs keep their hashes. Raises
    TableCorruptionError if the chain of ``before`` is not whole: new hashes would hide that.
    """
    rows = before.to_pylist()
    if link(table, Head(), rows)[0].to_pylist() != rows:
        raise TableCorruptionError(f"the hash chain of table {table.name} is broken", hint="`adtally verify` says where")
    return link(table, Head(), after.to_pylist())


def append_linked(
    lake: Lake,
    table: Table,
    rows: Callable[[Head], Sequence[Row]],
    step: Step,
    *,
    batch_id: int | None = None,
    transaction: Transaction | None = None,
    metadata: Mapping[str, object] | None = None,
    info: Mapping[str, str] | None = None,
) -> bool:
    """Append the rows that ``rows`` returns for the present head, in one commit; returns whether it was made: not without rows.

    If another process appends first, does all again after its rows. With ``transaction``, its holder's lock keeps others out. The
    commit's metadata have the new head.
    """
    tries = Attempts()
    while True:
        head = anchor(lake, table)
        added, new = link(table, head, rows(head))
        if not added.num_rows:
            return False
        made = False
        noted = {**(metadata or {}), **head_metadata(new)}
        with lake.writer(table) as writer:
            writer.write(added)
        try:
            made = lake.commit(
                table,
                step,
                add=writer.files,
                transaction=transaction or Transaction(_APP, new.position),
                metadata=noted,
                info=info,
                batch_id=batch_id,
            )
        except CommitFailedError as error:
            tries.wait_or_raise(error)
        if made or transaction is not None:
            return made
        if anchor(lake, table) == head:
            raise TableCorruptionError(f"the last rows of {lake.uri(table)} are gone", hint="`adtally verify` says which")


def anchor(lake: Lake, table: Table) -> Head:
    """Return the head of a chain; gives the rows of an older adtally their places first, in one commit that changes no value.

    That commit is the anchor of their chain: its metadata say how many rows it has.
    """
    found = _noted_head(lake, table)
    if found is not None:
        return found
    if not lake.rows(table, "row_hash").num_rows:
        return Head()
    with exclusive(lake.settings, REWRITE):
        found = _noted_head(lake, table)
        if found is not None:  # another process has done it meanwhile
            return found
        snapshot = lake.pin(table)
        rows = snapshot.rows(table).to_pylist()
        added, head = link(table, Head(), sorted(rows, key=lambda row: row[_ORDER[table.name]]))
        with lake.writer(table) as writer:
            writer.write(added)
        lake.commit(
            table,
            Step.CHAINED,
            base=snapshot.version(table),
            add=writer.files,
            remove=snapshot.files(table),
            metadata=head_metadata(head, anchored=head.position),
            changes_rows=False,
        )
        return head


def _noted_head(lake: Lake, table: Table) -> Head | None:
    """Return the head that the newest commit with one notes; if the log lost it, that of the last row. None: there is no chain."""
    for commit in lake.log(table).commits_backwards():
        noted = commit.metadata.get(_METADATA)
        if noted is not None:
            return Head(int(noted["position"]), str(noted["hash"]))
        if commit.version == 0:
            return None
    rows = lake.rows(table, "chain_position", "row_hash").to_pylist()
    last = max((row for row in rows if row["row_hash"]), key=lambda row: row["chain_position"], default=None)
    return None if last is None else Head(last["chain_position"], last["row_hash"])
