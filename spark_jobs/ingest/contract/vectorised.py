"""The fast validator: Arrow's JSON reader over a whole block of lines, then checks by column.

It only accepts. The exact validator judges every other line, and it alone defines why a line is rejected. Arrow's reader is strict
(a repeated key, a wrong type, a number that is no integer are errors), with two exceptions: it reads objects, not lines
(``flat_lines`` makes sure that they are the same), and it accepts NaN.

One bad line fails its block. A failed block is cut into smaller ones, down to SMALLEST_BLOCK lines, which go to the exact
validator. Arrow makes a column of each unknown field over all lines, and a small file may name millions. So unknown fields are
inferred from the first lines of a block, and a later unknown field fails the block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from spark_jobs.ingest.contract.alike import read_alike
from spark_jobs.ingest.contract.spec import CURRENCIES, EARLIEST_US, LATEST_US, REGION_FORM, BatchLimits, Contract, Field, FieldKind

SMALLEST_BLOCK = 32
_CUT_INTO = 16
_INFERRED_LINES = 256  # to infer unknown fields from: each line may have another one, and each makes a column
_MOST_QUOTES = 200  # per line, on average over these lines: all fields of the contract have 56
_CURRENCIES = pa.array(sorted(CURRENCIES))
_TIME_PATTERN = r"^\d{4}-\d\d-\d\dT([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)$"
_WIDTHS = (20, 22, 27)  # of a time without a fraction, and with the shortest and the longest
_ODD = (b"\\", b"[", b"\r", b"\0")


def parsed_schema(contract: Contract) -> pa.Schema:
    """Return the schema of parsed records: n (the line's number) and the fields, times as int64 microseconds since the epoch."""
    numbers = (FieldKind.INTEGER, FieldKind.TIME)
    fields = ((spec.name, pa.int64() if spec.kind in numbers else pa.string()) for spec in contract.fields)
    return pa.schema([("n", pa.int64()), *fields])


def flat_lines(data: bytes, ends: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which lines of ``data`` (line i ends before ``ends[i]``) have their only brace first, and no character of _ODD.

    An object in such a line neither nests another one, nor begins or ends in another line.
    """
    octets = np.frombuffer(data, dtype=np.uint8)
    starts = np.concatenate(([0], ends[:-1]))
    flat: npt.NDArray[np.bool_] = octets[starts] == ord("{")
    if np.count_nonzero(octets == ord("{")) != len(ends) or not flat.all():
        flat &= np.add.reduceat(octets == ord("{"), starts, dtype=np.int32) == 1
    for odd in _ODD:
        if odd in data:
            flat &= np.add.reduceat(octets == ord(odd), starts, dtype=np.int32) == 0
    return flat


def accept_plain(
    lines: pa.Table, contract: Contract, folder_region: str, limits: BatchLimits, *, own_region: bool = False
) -> pa.Table:
    """Parse the lines that are certainly valid (n int64; line string with its line feed, flat, valid UTF-8, within the size limit).

    Returns ``parsed_schema``: times as microseconds, received_at null when absent. ``own_region`` is as in ``validate_line``.
    """
    if REGION_FORM.fullmatch(folder_region) is None:
        return parsed_schema(contract).empty_table()
    numbers, texts = lines["n"].to_numpy(), lines["line"].combine_chunks()
    accepted = []
    while (found := _parsed_alike(texts, contract)) is not None:  # the lines of one form, then those of the next
        is_read, parsed = found
        accepted.append(_checked(parsed, contract, folder_region, limits, pa.array(numbers[is_read]), own_region))
        numbers, texts = numbers[~is_read], texts.filter(pa.array(~is_read))
        if len(numbers) > parsed.num_rows:  # the next pass would cost almost as much, for as little
            break
    for start, parsed in _parsed(texts, contract):
        n = pa.array(numbers[start : start + parsed.num_rows])
        accepted.append(_checked(parsed, contract, folder_region, limits, n, own_region))
    made = pa.concat_tables(accepted) if accepted else parsed_schema(contract).empty_table()
    return made.take(np.argsort(made["n"].to_numpy())) if len(accepted) > 1 else made


def _parsed_alike(lines: pa.StringArray, contract: Contract) -> tuple[npt.NDArray[np.bool_], pa.Table] | None:
    """Return which lines the fastest reader has read, and their fields with times as int64. None if it is of no use here."""
    found = read_alike(lines, contract)
    try:
        return None if found is None else (found[0], _times(found[1], contract))
    except pa.ArrowInvalid:
        return None


def _parsed(lines: pa.StringArray, contract: Contract, start: int = 0) -> Iterator[tuple[int, pa.Table]]:
    """Yield the blocks that Arrow can read: the number of the block's first line, and its fields with times as int64."""
    count = len(lines)
    if not count:
        return
    try:
        parsed = _times(_read(lines, contract), contract)
    except pa.ArrowInvalid:
        if count > SMALLEST_BLOCK:
            size = max(SMALLEST_BLOCK, -(-count // _CUT_INTO))
            for at in range(0, count, size):
                yield from _parsed(lines.slice(at, size), contract, start + at)
        return
    yield start, parsed


def _read(lines: pa.StringArray, contract: Contract) -> pa.Table:
    _, offsets, data = lines.buffers()
    ends = np.frombuffer(offsets, dtype=np.int32)[lines.offset : lines.offset + len(lines) + 1]
    text = data.slice(int(ends[0]), int(ends[-1] - ends[0]))
    schema = pa.schema([(spec.name, pa.int64() if spec.kind is FieldKind.INTEGER else pa.string()) for spec in contract.fields])
    if len(lines) <= _INFERRED_LINES:
        made = _read_inferred(text, schema, len(lines))
    else:
        try:
            made = _read_json(text, schema, "error")
        except pa.ArrowInvalid:
            end = int(ends[_INFERRED_LINES] - ends[0])
            wide = _wider(schema, _read_inferred(text.slice(0, end), schema, _INFERRED_LINES))
            if wide == schema:
                raise
            made = _read_json(text, wide, "error")
    if made.num_rows != len(lines):
        raise pa.ArrowInvalid("objects and lines do not agree")
    for name in made.column_names[len(schema) :]:  # unknown fields must be valid JSON too: no NaN
        if pa.types.is_floating(made[name].type) and not pc.all(pc.is_finite(made[name])).as_py():
            raise pa.ArrowInvalid("a number that JSON does not have")
    return made.select(schema.names)


def _read_json(text: pa.Buffer, schema: pa.Schema, unknown: str) -> pa.Table:
    return pj.read_json(
        pa.BufferReader(text),
        read_options=pj.ReadOptions(use_threads=False, block_size=text.size + 1),
        parse_options=pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior=unknown),
    )


def _read_inferred(text: pa.Buffer, schema: pa.Schema, count: int) -> pa.Table:
    """Read a few lines with their unknown fields. Each field becomes a column over all the lines, so neither may be many."""
    if bytes(text).count(b'"') > count * _MOST_QUOTES:
        raise pa.ArrowInvalid("too many fields")
    return _read_json(text, schema, "infer")


def _wider(schema: pa.Schema, sample: pa.Table) -> pa.Schema:
    """Add the unknown fields of a sample to the schema, each with a type that accepts more than the sample has."""
    for unknown in list(sample.schema)[len(schema) :]:
        kind = unknown.type
        if pa.types.is_integer(kind):
            kind = pa.float64()
        elif pa.types.is_timestamp(kind):
            kind = pa.string()
        schema = schema.append(pa.field(unknown.name, kind))
    return schema


def _times(parsed: pa.Table, contract: Contract) -> pa.Table:
    """Convert times to microseconds. Raises ArrowInvalid if a text is no time."""
    for index, spec in enumerate(contract.fields):
        if spec.kind is FieldKind.TIME:
            text = parsed[spec.name]
            if not _are_plain_times(text) and pc.any(pc.invert(pc.match_substring_regex(text, _TIME_PATTERN))).as_py():
                raise pa.ArrowInvalid("a time of another form")
            parsed = parsed.set_column(index, spec.name, text.cast(pa.timestamp("us", "UTC")).cast(pa.int64()))
    return parsed


def _are_plain_times(texts: pa.ChunkedArray) -> bool:
    """Return whether all texts have the digits that _TIME_PATTERN allows, and as many, and end with Z. Faster than the pattern."""
    column = texts.combine_chunks()
    if not len(column) or column.null_count:
        return False
    ends = np.frombuffer(column.buffers()[1], dtype=np.int32)[column.offset : column.offset + len(column) + 1]
    width = int(ends[1] - ends[0])
    if not (width == _WIDTHS[0] or _WIDTHS[1] <= width <= _WIDTHS[2]) or not (np.diff(ends) == width).all():
        return False
    octets = np.frombuffer(column.buffers()[2], dtype=np.uint8)[ends[0] : ends[-1]]
    places = np.ascontiguousarray(octets.reshape(-1, width).T)
    lowest, highest = (
        np.frombuffer(f"{form[: width - 1]}Z".encode(), dtype=np.uint8)[:, None]
        for form in ("0000-00-00T00:00:00.000000", "9999-99-99T29:59:59.999999")
    )
    after_23 = (places[11] == ord("2")) & (places[12] > ord("3"))
    return bool(((places >= lowest) & (places <= highest)).all() and not after_23.any())


def _valid(spec: Field, values: pa.ChunkedArray, folder_region: str, own_region: bool) -> pa.ChunkedArray:
    match spec.kind:
        case FieldKind.ID:
            size = pc.utf8_length(values)
            check = pc.and_(pc.greater_equal(size, 1), pc.less_equal(size, 128))
        case FieldKind.ENUM:
            check = pc.is_in(values, value_set=pa.array(spec.values))
        case FieldKind.CURRENCY:
            check = pc.is_in(values, value_set=_CURRENCIES)
        case FieldKind.REGION:
            own_form = f"^(?:{REGION_FORM.pattern})$"
            check = pc.match_substring_regex(values, own_form) if own_region else pc.equal(values, folder_region)
        case FieldKind.TIME:
            check = pc.and_(pc.greater_equal(values, EARLIEST_US), pc.less_equal(values, LATEST_US))
        case FieldKind.INTEGER:
            check = pc.and_(pc.greater_equal(values, 0), pc.less_equal(values, spec.high))
        case FieldKind.TEXT:
            return pa.chunked_array([pa.array(np.ones(len(values), dtype=bool))])
    return pc.fill_null(check, not spec.required)


def _checked(
    parsed: pa.Table, contract: Contract, folder_region: str, limits: BatchLimits, numbers: pa.Array, own_region: bool
) -> pa.Table:
    """Return the rows of a parsed block that meet every rule of the contract."""
    good = np.ones(parsed.num_rows, dtype=bool)
    for spec in contract.fields:
        good &= _valid(spec, parsed[spec.name], folder_region, own_region).to_numpy()
    times = parsed[contract.time_field].fill_null(0).to_numpy()
    received = pc.fill_null(parsed["received_at"], limits.ingested_us).to_numpy()
    good &= (times >= limits.earliest_us) & (times - limits.future_skew_us <= received)
    columns = [numbers]
    for spec in contract.fields:
        values = parsed[spec.name]
        if spec.kind is FieldKind.REGION:
            values = pc.fill_null(values, folder_region) if own_region else pa.repeat(pa.scalar(folder_region), parsed.num_rows)
        elif spec.default is not None:
            values = pc.fill_null(values, spec.default)
        columns.append(values)
    made = pa.Table.from_arrays(columns, schema=parsed_schema(contract))
    return made if good.all() else made.filter(pa.array(good))
