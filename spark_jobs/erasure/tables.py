"""Rewrite the rows of people in every table, and delete the data files of older versions that still have them.

The fingerprint of a record covers the token in place of the id. So nobody can find the id by trying: the token is random. A resend
of the record gets the same token when it is parsed, and with it the same fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.erasure.lines import KEPT_FIELDS, USER_FIELD, People, rewrite_line, rewrite_strings
from spark_jobs.ingest.contract.exact import validate_line
from spark_jobs.ingest.contract.parse import decode_raw, encode_raw
from spark_jobs.ingest.contract.spec import CONTRACTS, BatchLimits, FieldKind
from spark_jobs.ingest.dedupe.keys import hash_keys, hex_fingerprint
from spark_jobs.lake.chain import head_metadata, relink
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.data_files import DataFileWriter
from spark_jobs.lake.lake import Lake, Snapshot
from spark_jobs.lake.log import TOKENS_KEY
from spark_jobs.lake.reading import TableFile
from spark_jobs.lake.removal import rewrite_commits
from spark_jobs.lake.tables import CHAIN_COLUMNS, ERASURES, EVENTS, ORDERS, RAW_TABLES, REJECTED_TABLES, STREAMS, TABLES, Table
from spark_jobs.steps import Step

ID_COLUMNS = frozenset(("event_id", "order_id", "impression_id", "touch_event_id", "record_id", "campaign_id", "ad_id", "store_id"))
"""Columns with ids of other things than people: they stay, even if one is equal to the id of a person."""

_KEPT_COLUMNS = ID_COLUMNS | KEPT_FIELDS | {"source_file", "released_as", "fingerprint", "accepted_fingerprint", "rule_set"}
_ACCEPTED = {EVENTS.name: "events", ORDERS.name: "orders"}
_REJECTED = {table.name: stream for stream, table in REJECTED_TABLES.items()}
_ANY_TIME = BatchLimits(ingested_us=2**60, earliest_us=0, future_skew_us=2**61, hour_grace_us=0)
_ANY_REGION = "any"

Fingerprints = dict[str, dict[tuple[str, str], str]]
"""By stream: id of a record and fingerprint (16 hex digits) with a person's id -> fingerprint with the token."""

PERSONAL = tuple(table for table in TABLES.values() if table is not ERASURES)
"""The tables in which an id may be, in the order in which they are rewritten: an operator's reason may name somebody, too."""


class FingerprintMap:
    """Collects how the fingerprints of records change when tokens replace ids."""

    def __init__(self, people: People) -> None:
        self._people = people
        self._records: dict[str, list[dict[str, Any]]] = {stream: [] for stream in STREAMS}

    def add_line(self, stream: str, raw: bytes) -> None:
        """Add the record of a line or a value, if it is a valid one of the people."""
        verdict = validate_line(raw, CONTRACTS[stream], _ANY_REGION, _ANY_TIME, own_region=True)
        if verdict.values is not None and verdict.values[USER_FIELD] in self._people.tokens:
            self._records[stream].append(verdict.values)

    def add_tables(self, lake: Lake) -> None:
        """Add the accepted rows of the people, and their conflicts and raw records."""
        ids = pa.array(self._people.tokens, pa.string())
        for table in (EVENTS, ORDERS):
            stream = _ACCEPTED[table.name]
            rows = lake.pin(table).rows(table, where_in=(USER_FIELD, ids))
            self._records[stream] += _records_of_rows(rows, stream).to_pylist()
        for stream, table in REJECTED_TABLES.items():
            rows = lake.pin(table).rows(table, "outcome", "raw", "raw_encoding", where_in=("outcome", pa.array(["conflict"])))
            for row in rows.to_pylist():
                if row["raw"] is not None:
                    self.add_line(stream, decode_raw(row["raw"], row["raw_encoding"]))
        for stream, table in RAW_TABLES.items():
            snapshot = lake.pin(table)
            for batch in lake.read_batches(table, snapshot.paths(table), "value") if table in snapshot else ():
                for value in batch["value"].to_pylist():
                    if value is not None and self._people.may_be_in(value):
                        self.add_line(stream, value)

    def made(self) -> Fingerprints:
        """Return the fingerprints before and after."""
        found: Fingerprints = {}
        for stream, records in self._records.items():
            contract = CONTRACTS[stream]
            fields = [field for field in contract.fields if field.name in records[0]] if records else []
            kinds = (FieldKind.INTEGER, FieldKind.TIME)
            columns = {
                field.name: pa.array([one[field.name] for one in records], pa.int64() if field.kind in kinds else pa.string())
                for field in fields
            }
            found[stream] = {}
            if records:
                before = pa.table(columns)
                named = [self._people.tokens[one[USER_FIELD]] for one in records]
                after = before.set_column(before.schema.get_field_index(USER_FIELD), USER_FIELD, pa.array(named, pa.string()))
                both = (hash_keys(rows, contract)["fingerprint"].to_pylist() for rows in (before, after))
                for one, old, new in zip(records, *both, strict=True):
                    found[stream][one[contract.id_field], hex_fingerprint(old)] = hex_fingerprint(new)
        return found


def _records_of_rows(rows: pa.Table, stream: str) -> pa.Table:
    """Return rows of `events` or `orders` as parsed records. An order's fingerprint is that of its placing, once that has come."""
    columns = {}
    for field in CONTRACTS[stream].fields:
        column = rows[field.name]
        if field.name == "status":
            column = pc.if_else(pc.fill_null(rows["has_placed"], True), "placed", "cancelled")
        is_number = field.kind in (FieldKind.INTEGER, FieldKind.TIME)
        columns[field.name] = column.cast(pa.int64() if is_number else pa.string())
    return pa.table(columns)


def rewrite_table(lake: Lake, table: Table, people: People, fingerprints: Fingerprints, token: str, number: int) -> int:
    """Rewrite the data files that have rows of the people, in one commit; returns how many rows changed.

    The commit is made once per ``token``; ``number`` names its step for the crash tests. Raises TableCorruptionError if the table
    is hash-chained and the chain is broken.
    """
    transaction = Transaction(token, 0)
    if not lake.exists(table) or lake.has(table, transaction):
        return 0
    snapshot = lake.pin(table)
    with lake.writer(table) as writer:
        if CHAIN_COLUMNS[-1] in table.schema.names:
            removed, changed, head = _rewrite_chain(snapshot, table, people, writer)
        else:
            (removed, changed), head = _rewrite_files(snapshot, table, people, fingerprints, writer), {}
    if removed:
        lake.commit(
            table,
            Step.ERASED_ROWS,
            base=snapshot.version(table),
            add=writer.files,
            remove=removed,
            transaction=transaction,
            metadata={TOKENS_KEY: sorted(people.tokens.values()), **head},
            batch_id=number,
        )
    return changed


def _rewrite_files(
    snapshot: Snapshot, table: Table, people: People, fingerprints: Fingerprints, writer: DataFileWriter
) -> tuple[list[TableFile], int]:
    """Write the new rows of the files that have rows of the people; return these files, and how many rows changed."""
    removed = []
    rows_changed = 0
    for file in snapshot.files(table):
        changed = sum(_rewrite(rows, table, people, fingerprints)[1] for rows in snapshot.lake.read_file_rows(table, file))
        if changed:
            removed.append(file)
            rows_changed += changed
            for rows in snapshot.lake.read_file_rows(table, file):
                writer.write(_rewrite(rows, table, people, fingerprints)[0])
    return removed, rows_changed


def _rewrite_chain(
    snapshot: Snapshot, table: Table, people: People, writer: DataFileWriter
) -> tuple[list[TableFile], int, dict[str, object]]:
    """Do as `_rewrite_files` for a hash-chained table, and return what the commit notes of the new head.

    What an operator wrote may name somebody. The rows from the first changed one on get new hashes, unless the rows are those of an
    older adtally that no run has chained yet.
    """
    before = snapshot.rows(table).sort_by("chain_position").combine_chunks()
    rows, changed = _rewrite(before, table, people, {})
    if not changed:
        return [], 0, {}
    noted: dict[str, object] = {}
    if before["row_hash"].null_count < before.num_rows:
        rows, head = relink(table, before, rows)
        noted = head_metadata(head)
    writer.write(rows)
    return snapshot.files(table), changed, noted


def rewrite_log(lake: Lake, table: Table, people: People, number: int) -> None:
    """Replace ids in the commits of a table's log: the entry of an act has what the operator wrote. No reader reads these texts."""
    rewrite_commits(lake, table, lambda data: rewrite_strings(data, people), number)


def count_rows(lake: Lake, table: Table, people: People, fingerprints: Fingerprints) -> int:
    """Return how many rows `rewrite_table` would change."""
    snapshot = lake.pin(table)
    files = snapshot.files(table) if table in snapshot else []
    return sum(_rewrite(rows, table, people, fingerprints)[1] for file in files for rows in lake.read_file_rows(table, file))


def _rewrite(rows: pa.Table, table: Table, people: People, fingerprints: Fingerprints) -> tuple[pa.Table, int]:
    """Return rows with tokens, and how many of them changed."""
    changed = pa.array([False] * rows.num_rows, pa.bool_())
    before = rows
    for at, field in enumerate(rows.schema):
        column = before[field.name].combine_chunks()
        if field.name == USER_FIELD:
            made = _tokens(column, people)
        elif field.name == "raw":
            made, sizes = _raws(before, people)
            size_at = rows.schema.get_field_index("raw_size_bytes")
            rows = rows.set_column(size_at, rows.schema.field(size_at), sizes)
        elif field.name == "value" and field.type == pa.binary():
            made = _each(column, lambda value: rewrite_line(value, people), people)
        elif field.name in ("fingerprint", "accepted_fingerprint") and table.name in _REJECTED:
            made = _mapped(before, field.name, fingerprints[_REJECTED[table.name]])
        elif field.type == pa.string() and field.name not in _KEPT_COLUMNS:
            made = _each(column, lambda value: rewrite_strings(value, people), people)
        else:
            continue
        differs = pc.fill_null(pc.not_equal(made, column), False)
        changed = pc.or_(changed, differs)
        rows = rows.set_column(at, field, made)
    if table.name in _ACCEPTED and pc.any(changed).as_py():
        contract = CONTRACTS[_ACCEPTED[table.name]]
        new = hash_keys(_records_of_rows(rows, contract.stream), contract)["fingerprint"].combine_chunks().view(pa.int64())
        at = rows.schema.get_field_index("fingerprint")
        kept = pc.if_else(changed, new, rows["fingerprint"].combine_chunks())
        rows = rows.set_column(at, rows.schema.field(at), kept)
    return rows, pc.sum(changed).as_py() or 0


def _tokens(column: pa.Array, people: People) -> pa.Array:
    at = pc.index_in(column, value_set=pa.array(people.tokens, pa.string()))
    return pc.coalesce(pc.take(pa.array(people.tokens.values(), pa.string()), at), column)


def _each(column: pa.Array, rewrite: Callable[[bytes], bytes], people: People) -> pa.Array:
    """Rewrite each different value of a column of texts or bytes. Most are not looked at more closely."""
    is_text = column.type == pa.string()
    known: dict[Any, Any] = {}
    for value in pc.unique(column).drop_null().to_pylist():
        data = value.encode("utf-8", "surrogatepass") if is_text else value
        if not people.may_be_in(data) and (not is_text or value not in people.tokens):
            continue
        made = (people.tokens[value].encode() if value in people.tokens else rewrite(data)) if is_text else rewrite(data)
        if made != data:
            known[value] = made.decode("utf-8", "surrogatepass") if is_text else made
    if not known:
        return column
    return pa.array([known.get(value, value) for value in column.to_pylist()], column.type)


def _raws(rows: pa.Table, people: People) -> tuple[pa.Array, pa.Array]:
    """Rewrite the raw texts of rejected records; their sizes change with them."""
    raws, sizes = [], []
    for raw, encoding, size in zip(*(rows[name].to_pylist() for name in ("raw", "raw_encoding", "raw_size_bytes")), strict=True):
        if raw is not None:
            data = decode_raw(raw, encoding)
            made = rewrite_line(data, people)
            if made != data:
                size = None if size is None else size + len(made) - len(data)
                text, same = encode_raw(made)
                raw = text if same == encoding else raw
        raws.append(raw)
        sizes.append(size)
    return pa.array(raws, pa.string()), pa.array(sizes, pa.int64())


def _mapped(rows: pa.Table, name: str, new: Mapping[tuple[str, str], str]) -> pa.Array:
    pairs = zip(rows["record_id"].to_pylist(), rows[name].to_pylist(), strict=True)
    return pa.array([new.get((record_id, old), old) for record_id, old in pairs], pa.string())
