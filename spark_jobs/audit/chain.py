"""Check the hash chains of tables, by code that shares nothing with the code that writes them (docs/tamper-evidence.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from hashlib import sha256
from typing import Any

from msgspec import json as msgspec_json

from spark_jobs.errors import UsageError
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import AUDIT_LOG, BILLING_LINES, HOUR_CLOSINGS, Table

CHAINED = (BILLING_LINES, HOUR_CLOSINGS, AUDIT_LOG)
"""The tables whose rows are chained."""

_PLACE = ("chain_position", "previous_hash", "row_hash")
_START = "0" * 64
_SHOWN = {BILLING_LINES.name: "line_id", HOUR_CLOSINGS.name: "closed_through", AUDIT_LOG.name: "entry_id"}


class Fault(StrEnum):
    """How a chain is broken."""

    UNCHAINED = "unchained"  # an older adtally wrote the rows, and no run of this one has chained them yet
    CHANGED = "changed"
    REMOVED = "removed"
    INSERTED = "inserted"
    REORDERED = "reordered"
    REWRITTEN = "rewritten"  # the chain is whole, and does not contain a head that was noted outside


@dataclass(frozen=True)
class ChainFault:
    """A place at which a chain is broken. ``row`` is the row there; None where it is missing."""

    table: str
    fault: Fault
    position: int | None
    detail: str
    row: dict[str, Any] | None = None


@dataclass(frozen=True)
class NotedHead:
    """The last row of a chain, as text ``<table>:<position>:<hash>``."""

    table: str
    position: int
    hash: str

    def __str__(self) -> str:
        return f"{self.table}:{self.position}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> NotedHead:
        """Parse the text of a head. Raises UsageError if it is none."""
        table, _, rest = text.strip().partition(":")
        position, _, hashed = rest.partition(":")
        is_head = table in {one.name for one in CHAINED} and position.isdecimal() and len(hashed) == 64
        if not is_head:
            raise UsageError(f"{text!r} is no head of a chain", hint="as `adtally verify --head` prints it")
        return cls(table, int(position), hashed)


@dataclass(frozen=True)
class Chain:
    """A chained table: its rows in the order of the chain, unchained ones last, the faults, and the head (None: no row)."""

    table: Table
    rows: list[dict[str, Any]]
    faults: list[ChainFault]

    @property
    def head(self) -> NotedHead | None:
        """The last chained row."""
        last = next((row for row in reversed(self.rows) if row["row_hash"]), None)
        return None if last is None else NotedHead(self.table.name, last["chain_position"], last["row_hash"])

    def contains(self, head: NotedHead) -> bool:
        """Return whether the chain has the row that ``head`` names at its place."""
        return any((row["chain_position"], row["row_hash"]) == (head.position, head.hash) for row in self.rows) or (
            head.position == 0 and head.hash == _START
        )


def hash_of(table: str, previous: str, row: dict[str, Any]) -> str:
    """Return the hash that a row must have after a row with the hash ``previous``."""
    pairs = sorted((name, _text(value)) for name, value in row.items() if name not in _PLACE and value is not None)
    content = ",".join(f"{_quoted(name)}:{text}" for name, text in pairs)
    whole = f'{{"chain":{_quoted(table)},"previous":{_quoted(previous)},"row":{{{content}}}}}'
    return sha256(whole.encode("utf-8")).hexdigest()


def _text(value: Any) -> str:
    if isinstance(value, datetime):
        return f'"{value.year:04}{value:-%m-%dT%H:%M:%S.%f}Z"'  # strftime writes the year 1 as "1"
    if isinstance(value, date):
        return f'"{value.year:04}-{value.month:02}-{value.day:02}"'
    return _quoted(value) if isinstance(value, str) else str(int(value))


def _quoted(text: str) -> str:
    """Return a JSON string with as few escapes as JSON allows."""
    return msgspec_json.encode(text).decode("utf-8")


def read_chain(lake: Lake, table: Table) -> Chain:
    """Read a chained table and check it. A table that does not exist has no row and no fault."""
    snapshot = lake.pin(table)
    known = snapshot.columns(table) if table in snapshot else table.schema.names
    rows = snapshot.rows(table, *(name for name in table.schema.names if name in known)).to_pylist()
    for row in rows:
        for name in _PLACE:
            row.setdefault(name, None)
    chained = sorted((row for row in rows if row["row_hash"]), key=lambda row: (row["chain_position"] or 0, row["row_hash"]))
    loose = sorted((row for row in rows if not row["row_hash"]), key=lambda row: row.get("posting") or 0)
    noted = _noted(lake, table)
    if loose and not chained and noted is None:
        detail = f"{len(loose)} rows of an older adtally are not chained yet; `adtally bill` or the next act chains them"
        return Chain(table, loose, [ChainFault(table.name, Fault.UNCHAINED, None, detail)])
    faults = [*_broken(table.name, chained), *_tail(table.name, chained, noted)]
    faults += [ChainFault(table.name, Fault.INSERTED, None, f"{_named(table.name, row)} is not in the chain", row) for row in loose]
    return Chain(table, [*chained, *loose], faults)


def _broken(table: str, rows: list[dict[str, Any]]) -> Iterator[ChainFault]:
    hashes = {row["row_hash"] for row in rows}
    previous, place = _START, 0
    for row in rows:
        at, name = row["chain_position"] or 0, _named(table, row)
        if at == place:
            yield ChainFault(table, Fault.INSERTED, at, f"{name} has the place of another row", row)
        elif hash_of(table, row["previous_hash"] or "", row) != row["row_hash"]:
            yield ChainFault(table, Fault.CHANGED, at, f"{name} does not have the content that its hash was made of", row)
        elif at > place + 1:
            places = f"place {place + 1}" if at == place + 2 else f"places {place + 1} to {at - 1}"
            yield ChainFault(table, Fault.REMOVED, place + 1, f"the rows at {places} are gone, before {name}")
        elif row["previous_hash"] != previous and (row["previous_hash"] in hashes or row["previous_hash"] == _START):
            yield ChainFault(table, Fault.REORDERED, at, f"{name} belongs after another row", row)
        elif row["previous_hash"] != previous:
            yield ChainFault(
                table, Fault.REMOVED, at - 1, f"the row that {name} names as the one before it is gone or was replaced"
            )
        previous, place = row["row_hash"], at


def _tail(table: str, rows: list[dict[str, Any]], noted: NotedHead | None) -> Iterator[ChainFault]:
    """Compare the end of the chain with the head that the newest commit notes."""
    last = rows[-1]["chain_position"] if rows else 0
    if noted is None:
        return
    if noted.position > last:
        yield ChainFault(table, Fault.REMOVED, last + 1, f"the chain had {noted.position} rows and ends after {last}")
    elif not any((row["chain_position"], row["row_hash"]) == (noted.position, noted.hash) for row in rows):
        at = f"the row at place {noted.position} is not the one that was written there"
        yield ChainFault(table, Fault.CHANGED, noted.position, at)


def _noted(lake: Lake, table: Table) -> NotedHead | None:
    if not lake.exists(table):
        return None
    for commit in lake.log(table).commits_backwards():
        if isinstance(commit.metadata.get("chain"), dict):
            return NotedHead(table.name, int(commit.metadata["chain"]["position"]), str(commit.metadata["chain"]["hash"]))
    return None


def _named(table: str, row: dict[str, Any]) -> str:
    shown = row.get(_SHOWN[table])
    return f"{_SHOWN[table]} {shown.isoformat() if isinstance(shown, datetime) else shown}"
