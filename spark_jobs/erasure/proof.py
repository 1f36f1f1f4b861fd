"""Prove that an id is gone: read every file that is left, unpacked, and look for the id and its encodings.

It unpacks gzip, reads Parquet and Arrow files by column, and DuckDB and SQLite files by table, because their bytes are compressed
or cut into pages. Of every other file it reads the bytes. The ids of other things (ID_COLUMNS) may be equal to the id of a person.
"""

from __future__ import annotations

import gzip
import shutil
import sqlite3
import zlib
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spark_jobs.config import Settings
from spark_jobs.erasure.lines import USER_FIELD, People, has_person
from spark_jobs.erasure.suppression import QUEUE, RUNS, erasure_place
from spark_jobs.erasure.tables import ID_COLUMNS
from spark_jobs.lake.duck import literal
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.places import Place, open_place
from spark_jobs.lake.scratch import scratch_folder
from spark_jobs.lake.tables import ATTRIBUTED_ORDERS, BATCH_LEDGER, BILLING_LINES, EVENTS, MINUTE_METRICS, ORDERS, REJECTED_TABLES

_BLOCK_BYTES = 8 * 1024 * 1024
_OVERLAP_BYTES = 4096
_DUCKDB = (".duckdb", ".db")
_SQLITE_HEAD = b"SQLite format 3\0"
_UNREAD = ("services/", "scratch/")
"""Below the home: jars and logs of trial services, and working files, which no command leaves behind."""


@dataclass
class Finding:
    """A place that still has the id of a person, and how often, or in how many rows."""

    place: str
    count: int


@dataclass
class Search:
    """What was read: files, and bytes as stored. ``findings`` are empty if nobody was found."""

    files: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)


def search(settings: Settings, people: People, landing_names: Iterable[str] | None = None) -> Search:
    """Read all files below the lakehouse, the landing folder, the archive of raw input, the rules and the home; each once.

    ``landing_names`` limits the landing files to those that were there when the erasure was decided: what came later is under the
    suppression list, and the next erasure rewrites it.
    """
    made = Search()
    names = None if landing_names is None else set(landing_names)
    home = str(settings.home_path)
    done: list[str] = []
    own = erasure_place(settings).uri
    for uri in filter(None, (settings.lakehouse_uri, settings.landing_uri, settings.raw_archive_uri, settings.rules_uri, home)):
        place = open_place(uri)
        for name in place.every_name():
            full = f"{uri}/{name}"
            if any(full.startswith(f"{one}/") for one in (*done, f"{own}/{RUNS}", f"{own}/{QUEUE}")):
                continue
            if uri == home and name.startswith(_UNREAD):
                continue
            if uri == settings.landing_uri and names is not None and name.startswith(("events/", "orders/")) and name not in names:
                continue
            try:
                count = search_file(settings, place, name, people)
            except FileNotFoundError:  # a running service has removed it
                continue
            found = place.find(name)
            made.files += 1
            made.bytes += 0 if found is None else found.size
            if count:
                made.findings.append(Finding(full, count))
        done.append(uri)
    return made


def search_file(settings: Settings, place: Place, name: str, people: People) -> int:
    """Return how often a file has one of the people, in lines, rows or cells."""
    with place.local_files([name]) as (path,):
        return _count(settings, path, name, people)


def _count(settings: Settings, path: Path, name: str, people: People) -> int:
    with path.open("rb") as file:
        head = file.read(16)
    if name.endswith(".gz"):
        with path.open("rb") as stored:
            return _count_bytes(_Unpacked(stored), people)
    if head[:4] == b"PAR1":
        return _count_parquet(path, people)
    if head[:6] == b"ARROW1":
        with pa.OSFile(str(path)) as source:
            reader = pa.ipc.open_file(source)
            return sum(_count_columns(pa.table(reader.get_batch(at)), people) for at in range(reader.num_record_batches))
    if head == _SQLITE_HEAD:
        return _count_sqlite(settings, path, people)
    if name.endswith(_DUCKDB) or head[8:12] == b"DUCK":
        return _count_duckdb(settings, path, people)
    with path.open("rb") as stored:
        return _count_bytes(stored, people)


class _Unpacked:
    """The content of a gzip file as far as it can be unpacked, then what is stored after a wrong byte."""

    def __init__(self, stored: BinaryIO) -> None:
        self._stored = stored
        self._packed: gzip.GzipFile | None = gzip.GzipFile(fileobj=stored)

    def read(self, size: int) -> bytes:
        if self._packed is not None:
            with suppress(OSError, EOFError, zlib.error):
                return self._packed.read1(min(size, 65536)) or self._rest(size)
        return self._rest(size)

    def _rest(self, size: int) -> bytes:
        self._packed = None
        return self._stored.read(size)


def _count_bytes(stored: Any, people: People) -> int:
    """Count the lines of a text that have a person. A line of a binary file is whatever is between two line feeds."""
    count = 0
    rest = b""
    while block := stored.read(_BLOCK_BYTES):
        data = rest + block
        cut = data.rfind(b"\n") + 1
        if not cut and len(data) > 2 * _BLOCK_BYTES:
            cut = len(data) - _OVERLAP_BYTES
        count += _count_lines(data[:cut], people)
        rest = data[cut:]
    return count + _count_lines(rest, people)


def _count_lines(data: bytes, people: People) -> int:
    if not people.may_be_in(data):
        return 0
    return sum(people.may_be_in(line) and has_person(line, people) for line in data.split(b"\n"))


def _count_parquet(path: Path, people: People) -> int:
    with pq.ParquetFile(path) as file:
        facts = str(file.metadata.metadata or {}).encode()
        count = int(people.has_word(facts))
        schema = file.schema_arrow
        for group in range(file.num_row_groups):
            count += _count_columns(file.read_row_group(group), people)
            for at in range(file.metadata.num_columns):
                column = file.metadata.row_group(group).column(at)
                found = column.statistics
                if found is not None and found.has_min_max and column.path_in_schema.split(".")[0] not in ID_COLUMNS:
                    count += sum(_is_found(value, column.path_in_schema, people) for value in (found.min, found.max))
        return count + int(any(people.has_word(name.encode()) for name in schema.names))


def _count_columns(rows: pa.Table, people: People) -> int:
    return sum(_count_values(name, rows[name], people) for name in rows.column_names if name not in ID_COLUMNS)


def _count_values(name: str, column: pa.ChunkedArray, people: People) -> int:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _count_values(name, column.cast(kind.value_type), people)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _count_values(name, pa.chunked_array([pc.list_flatten(chunk) for chunk in column.chunks], kind.value_type), people)
    if pa.types.is_struct(kind):
        fields = ((kind.field(at).name, at) for at in range(kind.num_fields))
        inner = ((one, pa.chunked_array([pc.struct_field(chunk, [at]) for chunk in column.chunks])) for one, at in fields)
        return sum(_count_values(one, values, people) for one, values in inner if len(values.chunks) and one not in ID_COLUMNS)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind) or _is_view(kind)):
        return 0
    if _is_view(kind):
        column = column.cast(pa.string())
    counts = pc.value_counts(column.combine_chunks())
    return sum(one["counts"] for one in counts.to_pylist() if one["values"] is not None and _is_found(one["values"], name, people))


def _is_view(kind: pa.DataType) -> bool:
    return str(kind) == "string_view"


def _is_found(value: object, name: str, people: People) -> bool:
    """Return whether a cell has a person: a cell of user_id is the id of somebody, any other one a text or a record."""
    if isinstance(value, str):
        if value in people.tokens:
            return True
        value = value.encode("utf-8", "surrogatepass")
        if name == USER_FIELD:
            return False
    return isinstance(value, bytes) and people.may_be_in(value) and has_person(value, people)


def _count_duckdb(settings: Settings, path: Path, people: People) -> int:
    """Count the cells of all tables. Opens a copy: the file may be in use."""
    with scratch_folder(settings, "proof-") as folder:
        copy = shutil.copyfile(path, folder / "copy.duckdb")
        count = 0
        with duckdb.connect(str(copy), read_only=True) as database:
            tables = database.sql(
                "select database_name, schema_name, table_name from duckdb_tables() where not internal"
            ).fetchall()
            for names in tables:
                name = ".".join(f'"{one}"' for one in names)
                for batch in database.execute(f"select * from {name}").to_arrow_reader(65536):
                    count += _count_columns(pa.Table.from_batches([batch]), people)
            views = database.sql("select sql from duckdb_views() where not internal").fetchall()
            return count + sum(people.has_word((sql or "").encode()) for (sql,) in views)


def _count_sqlite(settings: Settings, path: Path, people: People) -> int:
    with scratch_folder(settings, "proof-") as folder:
        copy = folder / "copy.sqlite"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
            count = 0
            for (table,) in target.execute("select name from sqlite_master where type = 'table'").fetchall():
                for row in target.execute(f'select * from "{table}"'):
                    count += sum(_is_found(value, "", people) for value in row if isinstance(value, str | bytes))
    return count


def totals(settings: Settings) -> dict[str, str]:
    """Return the numbers that an erasure must not change, as texts, by their name.

    Of each table that has people the number of rows and a hash over all its columns but the changed ones; the sums of ledger,
    increments, credits and bills.
    """
    lake = Lake(settings)
    made: dict[str, str] = {}
    personal = {USER_FIELD, "fingerprint", "accepted_fingerprint", "raw", "raw_size_bytes", "raw_encoding"}
    with lake.database() as database:

        def ask(name: str, table: Any, what: str, group: str = "") -> None:
            if lake.exists(table):
                by = f" group by {group} order by {group}" if group else ""
                rows = database.execute(f"select {what} from {lake.scan(table)}{by}").fetchall()
                made[name] = "; ".join(", ".join(map(str, row)) for row in rows)

        for table in (EVENTS, ORDERS, ATTRIBUTED_ORDERS, BILLING_LINES, MINUTE_METRICS, BATCH_LEDGER, *REJECTED_TABLES.values()):
            columns = [name for name in lake.pin(table).columns(table) if name not in personal] if lake.exists(table) else []
            ask(f"{table.name} (rows, content)", table, f"count(*), sum(hash({', '.join(columns)})::hugeint)")
        counts = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "invalid_traffic", "spend_nanos")
        ask("ledger", BATCH_LEDGER, "stream, " + ", ".join(f"sum({name})" for name in counts), "stream")
        measures = ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "spend_nanos", "invalid_spend_nanos")
        ask("spend", MINUTE_METRICS, "currency, " + ", ".join(f"sum({name})" for name in measures), "currency")
        ask("orders", ORDERS, "currency, status, count(*), sum(total_micros)", "currency, status")
        credits = "sum(list_sum(last_click_micros)), sum(list_sum(linear_micros))"
        ask("credits", ATTRIBUTED_ORDERS, f"currency, count(*), {credits}", "currency")
        ask("bills", BILLING_LINES, "currency, line_type, count(*), sum(amount_micros)", "currency, line_type")
        people = f"count(*), count(distinct {USER_FIELD})"
        ask(
            "events a person",
            EVENTS,
            f"{people}, (select max(n) from (select count(*) as n from "
            f"{lake.scan(EVENTS) if lake.exists(EVENTS) else literal('')} group by {USER_FIELD}))",
        )
    return made


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return which totals differ."""
    return [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
