"""The fast validator: DuckDB's JSON reader over a whole chunk of lines.

It only says yes. A line that it does not take (a null, an unknown field, an escape, an odd number, anything wrong) goes to the
exact validator, so the meaning of the contract has one home. DuckDB's reader is laxer than JSON (trailing commas, NaN, repeated
keys) and turns any value into text. What closes these gaps, for a line without backslash and nested value: the keys are as many
as the contract's fields that have a value (nothing unknown, repeated or null); the integers are digits; the double quotes are as
many as if all other values were strings; and the line ends in ``"}`` or a digit and ``}``.
"""

from __future__ import annotations

import json
from functools import cache

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.contract.spec import CURRENCIES, LATEST_US, Contract, Field, Kind, Limits

_TIME_PATTERN = r"\d{4}-\d\d-\d\dT([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"


@cache
def connection() -> duckdb.DuckDBPyConnection:
    """This process's DuckDB: one thread (Spark owns the parallelism), times in UTC, no extension fetched."""
    made = duckdb.connect()
    made.execute("set threads = 1")
    made.execute("set memory_limit = '1GB'")
    made.execute("set autoinstall_known_extensions = false")
    return made


def _accepts(spec: Field) -> str:
    """SQL that is true where the field, a string unless it is an integer, is certainly valid."""
    name = spec.name
    match spec.kind:
        case Kind.ID:
            check = f"length({name}) between 1 and 128"
        case Kind.ENUM:
            check = f"{name} in ({', '.join(repr(value) for value in spec.values)})"
        case Kind.REGION:
            check = f"{name} = $region"
        case Kind.TIME:
            check = f"regexp_full_match({name}, '{_TIME_PATTERN}') and try_cast({name} as timestamptz) is not null"
        case Kind.INTEGER:
            check = f"regexp_full_match({name}, '0|[1-9][0-9]{{0,15}}') and try_cast({name} as bigint) <= {spec.high}"
        case Kind.TEXT | Kind.CURRENCY:
            check = "true"
    return f"({name} is not null and {check})" if spec.required else f"({name} is null or ({check}))"


def _value(spec: Field) -> str:
    match spec.kind:
        case Kind.INTEGER:
            number = f"try_cast({spec.name} as bigint)"
            return number if spec.default is None else f"coalesce({number}, {spec.default})"
        case Kind.TIME:
            return f"epoch_us(try_cast({spec.name} as timestamptz))"
        case Kind.REGION:
            return "$region"
        case _:
            return spec.name


@cache
def _queries(contract: Contract) -> tuple[str, str]:
    structure = json.dumps({s.name: "JSON" if s.kind is Kind.INTEGER else "VARCHAR" for s in contract.fields})
    present = " + ".join(f"({s.name} is not null)::int" for s in contract.fields)
    integers = " + ".join(f"({s.name} is not null)::int" for s in contract.fields if s.kind is Kind.INTEGER)
    values = ", ".join(f"{_value(s)} as {s.name}" for s in contract.fields)
    checks = " and ".join(_accepts(s) for s in contract.fields)
    # two statements: in one, the optimiser repeats json_transform for every field that a filter names
    parse = f"""
        create or replace temp table parsed as
        select n, quotes, len(json_keys(line)) as key_count, unnest(json_transform(line, '{structure}'))
        from lines
        where json_valid(line) and (ends_with(line, '"}}' || chr(10)) or regexp_matches(right(line, 3), '[0-9]}}\n$'))
    """
    accept = f"""
        with plain as (
            select n, {values} from parsed
            where key_count = {present} and quotes = 4 * key_count - 2 * ({integers}) and {checks}
        )
        select * from plain
        where {contract.time_field} >= $earliest
            and {contract.time_field} <= least(coalesce(received_at, $ingested) + $skew, {LATEST_US})
            and (received_at is null or received_at <= {LATEST_US})
    """
    return parse, accept


def flat_lines(data: bytes, ends: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32]]:
    """Per line of ``data`` (line i ends before ``ends[i]``): is it free of backslashes and nested values; its double quotes."""
    octets = np.frombuffer(data, dtype=np.uint8)
    starts = np.concatenate(([0], ends[:-1]))
    quotes = np.add.reduceat(octets == ord('"'), starts, dtype=np.int32)
    flat = np.ones(len(ends), dtype=bool)
    # one brace a line and each at the start of its line: none nested. The total alone could hide one behind a line without any
    braces = data.count(b"{") == len(ends) and bool(np.all(octets[starts] == ord("{")))
    if not braces or b"\\" in data or b"[" in data:
        odd = (octets == ord("\\")) | (octets == ord("["))
        flat &= np.add.reduceat(odd, starts, dtype=np.int32) == 0
        flat &= np.add.reduceat(octets == ord("{"), starts, dtype=np.int32) == 1
    return flat, quotes


def accept_plain(lines: pa.Table, contract: Contract, folder_region: str, limits: Limits) -> pa.Table:
    """The certainly valid ones of ``lines`` (n int64; line string with its line feed, flat, valid UTF-8, within the size limit;
    quotes int32).

    Returns n and the contract's fields in its order: strings, int64, times as int64 microseconds, received_at null when absent.
    """
    parse, accept = _queries(contract)
    database = connection()
    database.register("lines", lines)
    try:
        database.execute(parse)
    finally:
        database.unregister("lines")
    accepted = database.execute(
        accept,
        {
            "region": folder_region,
            "earliest": limits.earliest_us,
            "ingested": limits.ingested_us,
            "skew": limits.future_skew_us,
        },
    ).to_arrow_table()
    known = pc.is_in(accepted["currency"], value_set=pa.array(sorted(CURRENCIES)))
    return accepted if pc.all(known).as_py() in (True, None) else accepted.filter(known)
