"""The fastest reader: lines of one form, cut at their quotes.

A program writes its lines in one form: the same keys in the same order, with the same blanks. `_form_of` takes the form from a
line: the texts around its values. Arrow's CSV reader, with the quote as delimiter, then cuts all lines into their values, which
takes a third of the time of a JSON reader. A line is accepted only if it consists of the form's texts and of its values, and if
each number is written as JSON writes it. So it is an object with exactly the form's fields. All other lines are left to the JSON
reader.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv

from spark_jobs.ingest.contract.spec import Contract, FieldKind

Ints = npt.NDArray[np.int64]

FEWEST_LINES = 256
_SAMPLED = 16  # lines
_ALIKE = 12  # of them must have one form
_SKIPPED_SHARE = 8  # at most one line in so many may have another number of cells
_BLOCK_BYTES = 1024 * 1024
_NUMBER_CELL = re.compile(r"(\s*:\s*)(-?\d+)(\s*[,}]\s*)", flags=re.ASCII)
_WHOLE_NUMBER = r"^(0|-?[1-9][0-9]{0,17})$"
_FIRST_PRINTABLE = 32  # JSON has no smaller character in a string


@dataclass(frozen=True)
class _Value:
    """A field, the cell of a line that has its value, and how many characters around the value are the form's (None: a string)."""

    name: str
    cell: int
    trim: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Form:
    """The texts before each value and after the last one. ``cells`` counts the cells: a quote ends a cell and begins the next."""

    texts: tuple[str, ...]
    values: tuple[_Value, ...]
    cells: int


def read_alike(lines: pa.StringArray, contract: Contract) -> tuple[npt.NDArray[np.bool_], pa.Table] | None:
    """Read the lines that have the form of most lines. All are flat (`vectorised.flat_lines`), and valid UTF-8.

    Returns which lines it read, and their fields: integers as int64, others as text, null if the form lacks them. None if the lines
    are few or have many forms.
    """
    count = len(lines)
    if count < FEWEST_LINES:
        return None
    sample = [_form_of(lines[at].as_py(), contract) for at in np.linspace(0, count - 1, _SAMPLED, dtype=int).tolist()]
    form, alike = Counter(sample).most_common(1)[0]
    if form is None or alike < _ALIKE:
        return None
    _, offsets, data = lines.buffers()
    ends = np.frombuffer(offsets, dtype=np.int32)[lines.offset : lines.offset + count + 1]
    text = data.slice(int(ends[0]), int(ends[-1] - ends[0]))
    if np.count_nonzero(np.frombuffer(text, dtype=np.uint8) < _FIRST_PRINTABLE) != count:  # each line has its line feed
        return None
    is_read = np.ones(count, dtype=bool)
    try:
        cells = _cut(text, form, is_read)
    except pa.ArrowInvalid:
        return None
    starts = (ends[:-1] - ends[0])[is_read].astype(np.int64)
    sizes = np.diff(ends)[is_read].astype(np.int64)
    good = np.ones(len(starts), dtype=bool)
    fields: dict[str, pa.Array] = {}
    lengths = []
    for value in form.values:
        field = cells[str(value.cell)].combine_chunks()
        if value.trim is not None:
            field = pc.utf8_slice_codeunits(field, value.trim[0], -value.trim[1])
        lengths.append(_lengths(field))
        fields[value.name] = field if value.trim is None else _whole_numbers(field, good)
    has_form = _has_form(text, starts, sizes, form, lengths)
    if len(has_form) and not has_form[-1]:  # it may end with the last bytes
        has_form[-1] = _form_of(lines[int(np.flatnonzero(is_read)[-1])].as_py(), contract) == form
    good &= has_form
    found = pa.table(
        {
            one.name: fields.get(one.name, pa.nulls(len(starts), pa.int64() if one.kind is FieldKind.INTEGER else pa.string()))
            for one in contract.fields
        }
    )
    if not good.all():
        found = found.filter(pa.array(good))
        is_read[np.flatnonzero(is_read)[~good]] = False
    return is_read, found


def _has_form(text: pa.Buffer, starts: Ints, sizes: Ints, form: _Form, lengths: list[Ints]) -> npt.NDArray[np.bool_]:
    """Return which lines have the form's texts around values of these ``lengths``, and nothing else.

    These texts have all quotes of such a line, so the cells are its values. They are compared eight bytes at a time. The result may
    be False for a line that ends with the last bytes of ``text``.
    """
    octets = np.frombuffer(text, dtype=np.uint8)
    if octets.ctypes.data % 8:
        octets = octets.copy()
    words = octets[: len(octets) // 8 * 8].view("<u8")
    good: npt.NDArray[np.bool_] = sizes == sum(lengths) + sum(len(one.encode()) for one in form.texts)
    at = starts
    for one, length in zip(form.texts, [*lengths, None], strict=True):
        data = one.encode()
        first = at >> 3
        shift = ((at & 7) << 3).astype(np.uint64)
        rest = 64 - shift
        word = words.take(first, mode="clip")
        for place in range(0, len(data), 8):
            first = first + 1
            after = words.take(first, mode="clip")
            wanted = data[place : place + 8]
            differs = ((word >> shift) | (after << rest)) ^ np.uint64(int.from_bytes(wanted, "little"))
            good &= (differs if len(wanted) == 8 else differs << np.uint64(64 - 8 * len(wanted))) == 0
            word = after
        if length is not None:
            at = at + (len(data) + length)
    return good


def _lengths(texts: pa.StringArray) -> Ints:
    ends = np.frombuffer(texts.buffers()[1], dtype=np.int32, count=len(texts) + 1, offset=4 * texts.offset)
    return np.diff(ends).astype(np.int64)


def _whole_numbers(texts: pa.StringArray, good: npt.NDArray[np.bool_]) -> pa.Array:
    """Return the numbers, and clear ``good`` of texts that are no whole number as JSON writes it."""
    try:
        numbers = texts.cast(pa.int64())
        is_whole = pc.equal(numbers.cast(pa.string()), texts)
    except pa.ArrowInvalid:
        is_whole = pc.match_substring_regex(texts, _WHOLE_NUMBER)
        numbers = pc.if_else(is_whole, texts, "0").cast(pa.int64())
    good &= is_whole.to_numpy(zero_copy_only=False)
    return numbers


def _cut(text: pa.Buffer, form: _Form, is_read: npt.NDArray[np.bool_]) -> pa.Table:
    """Return the form's cells of the lines that have as many cells as the form, and clear ``is_read`` of the others.

    Raises ArrowInvalid if these are many, because each costs as much as to read it.
    """
    left = len(is_read) // _SKIPPED_SHARE

    def skip(row: pv.InvalidRow) -> str:
        nonlocal left
        left -= 1
        is_read[row.number - 1] = False
        return "skip" if left >= 0 else "error"

    wanted = [str(value.cell) for value in form.values]
    return pv.read_csv(
        pa.BufferReader(text),
        read_options=pv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES, column_names=[str(at) for at in range(form.cells)]),
        parse_options=pv.ParseOptions(delimiter='"', quote_char=False, escape_char=False, invalid_row_handler=skip),
        convert_options=pv.ConvertOptions(
            include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=False, check_utf8=False
        ),
    )


def _form_of(line: str, contract: Contract) -> _Form | None:
    """Return the form of a line; None if a field is unknown, repeated, or no string, whole number or null."""
    try:
        record = json.loads(line, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    kinds = {field.name: int if field.kind is FieldKind.INTEGER else str for field in contract.fields}
    cells = line.split('"')
    texts: list[str] = []
    values: list[_Value] = []
    text, at = cells[0], 1
    for key, content in record:
        kind = kinds.pop(key, None)
        if kind is None or (content is not None and type(content) is not kind):
            return None
        text += f'"{key}"'
        if content is None:
            text += cells[at + 1]
            at += 2
        elif isinstance(content, str):
            texts.append(f'{text}{cells[at + 1]}"')
            values.append(_Value(key, at + 2))
            text = f'"{cells[at + 3]}'
            at += 4
        else:
            number = _NUMBER_CELL.fullmatch(cells[at + 1])
            if number is None:
                return None
            texts.append(text + number[1])
            values.append(_Value(key, at + 1, (len(number[1]), len(number[3]))))
            text = number[3]
            at += 2
    return _Form((*texts, text), tuple(values), len(cells)) if values else None
