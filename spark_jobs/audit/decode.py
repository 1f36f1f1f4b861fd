"""Decode lines of landing files, and values of Kafka records, into records (``contract.record_schema``).

Each line goes first to msgspec, which decodes it into a typed struct several times as fast as ``contract.judge_line`` applies rule
after rule. A line that is then certainly valid is done; any other line goes to ``judge_line``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from operator import itemgetter
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from msgspec.structs import astuple
from xxhash import xxh3_64_intdigest

from spark_jobs.audit.contract import (
    ID_AND_TIME,
    LONGEST_LINE,
    PAYLOAD,
    REGION_NAME,
    RULES,
    Judged,
    judge_line,
    read_time,
    record_schema,
)
from spark_jobs.audit.suppressed import NOBODY, State, open_suppressed

Ints = npt.NDArray[np.int64]
Row = tuple[Any, ...]
"""The values of ``record_schema``, in its order."""

_ROWS_AT_ONCE = 10_000  # a block of line feeds has two million lines
_REFUSED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def _struct(stream: str) -> type[msgspec.Struct]:
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for rule in RULES[stream]:
        kind: Any = str
        if rule.kind == "id":
            kind = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
        elif rule.kind == "choice":
            kind = Literal.__getitem__(rule.choices)
        elif rule.kind == "amount":  # without float, msgspec would read 1.0 as the integer 1
            kind = Annotated[int, msgspec.Meta(ge=0, le=rule.most)] | float
        fields.append((rule.name, kind) if rule.is_required else (rule.name, kind | None, None))
    return msgspec.defstruct(f"_{stream}", fields, kw_only=True, gc=False)


_ANYTHING = msgspec.json.Decoder()
_DECODERS = {stream: msgspec.json.Decoder(_struct(stream)) for stream in RULES}


def _quotation_marks(value: object) -> int:
    """Return the least number of quotation marks that a decoded value can have had: two per key, two per text."""
    if isinstance(value, dict):
        return 2 * len(value) + sum(map(_quotation_marks, value.values()))
    if isinstance(value, list):
        return sum(map(_quotation_marks, value))
    return 2 if isinstance(value, str) else 0


class _LineReader:
    """Reads lines of files in the folder of region ``folder``; None: values, which may name any region."""

    def __init__(self, stream: str, folder: str | None, suppressed: State) -> None:
        self._stream, self._folder = stream, folder
        self._suppressed = open_suppressed(suppressed)
        self._user = record_schema(stream).get_field_index("user_id")
        self._is_valid_folder = folder is None or REGION_NAME.fullmatch(folder) is not None
        self._decode = _DECODERS[stream].decode
        self._size = len(RULES[stream])
        place = {rule.name: at for at, rule in enumerate(RULES[stream])}
        self._amounts = [at for at, rule in enumerate(RULES[stream]) if rule.kind == "amount"]
        self._id, self._time = (place[name] for name in ID_AND_TIME[stream])
        self._received, self._region = place["received_at"], place["region"]
        self._payload = itemgetter(*(place[name] for name in PAYLOAD[stream]))

    def read(self, raw: bytes, number: int, *, is_terminated: bool = True) -> Row:
        """Return the record of a line, which has no line feed at its end, or of a value."""
        row = self._read_valid(raw, number)
        row = row or _row(number, judge_line(raw, self._stream, self._folder, is_terminated=is_terminated), self._stream)
        if not self._suppressed or row[self._user] is None:
            return row
        return *row[: self._user], self._suppressed.name(row[self._user]), *row[self._user + 1 :]

    def _read_valid(self, raw: bytes, number: int) -> Row | None:
        """Return the record of a line that is certainly valid; None for any other line.

        msgspec is more lenient than the contract in three ways. It reads the last of a key that occurs twice, a float where the
        field may also be an integer, and white space around the object.
        """
        if len(raw) > LONGEST_LINE or b"\n" in raw or raw.endswith(b"\r") or not self._is_valid_folder:
            return None
        try:
            values: list[Any] = list(astuple(self._decode(raw)))
        except _REFUSED:
            return None
        marks = 4 * (self._size - values.count(None))  # of the key and of the text
        for at in self._amounts:
            value = values[at]
            if type(value) is float:
                return None
            if value is None:
                values[at] = 0
            else:
                marks -= 2
        # Where a line has more, the rest are nulls, unknown fields, or a key that occurs twice.
        if raw.count(b'"') != marks and not _has_unique_keys(raw):
            return None
        time_us = read_time(values[self._time])
        received_us = None if (text := values[self._received]) is None else read_time(text)
        if type(time_us) is str or type(received_us) is str:
            return None
        region = values[self._region]
        if region is not None and (region != self._folder if self._folder is not None else not REGION_NAME.fullmatch(region)):
            return None
        record_id = values[self._id]
        named = region if self._folder is None else None
        return number, True, None, record_id, time_us, received_us, *self._payload(values), named, _hash(record_id)


def _has_unique_keys(raw: bytes) -> bool:
    """Return whether a line that may have nulls and unknown fields certainly has no key twice, at any depth."""
    try:
        return raw.count(b'"') == _quotation_marks(_ANYTHING.decode(raw))
    except _REFUSED:
        return False


def _hash(record_id: str) -> int:
    return xxh3_64_intdigest(record_id.encode())


def _row(number: int, judged: Judged, stream: str) -> Row:
    fields = judged.fields or dict.fromkeys(PAYLOAD[stream])
    id_hash = None if judged.record_id is None else _hash(judged.record_id)
    known = (judged.record_id, judged.time_us, judged.received_us)
    return number, judged.fields is not None, judged.reasons or None, *known, *fields.values(), judged.region, id_hash


def _table(rows: Iterable[Row], stream: str) -> pa.Table:
    schema = record_schema(stream)
    rows = iter(rows)
    parts = []
    while some := list(islice(rows, _ROWS_AT_ONCE)):
        columns = zip(*some, strict=True)
        parts.append(pa.table([pa.array(values, kind) for values, kind in zip(columns, schema.types, strict=True)], schema=schema))
    return pa.concat_tables(parts) if parts else schema.empty_table()


def rejected(reason: str, line: int, stream: str) -> pa.Table:
    """Return the record that stands for what is not a readable line."""
    return _table([_row(line, Judged([reason]), stream)], stream)


def parse_block(data: bytes, first: int, stream: str, folder: str, suppressed: State = NOBODY) -> pa.Table:
    """Return the records of whole lines, numbered from ``first``. The last line may lack its line feed."""
    lines = data.split(b"\n")
    is_terminated = not lines[-1]
    if is_terminated:
        lines.pop()
    reader = _LineReader(stream, folder, suppressed)
    last = first + len(lines) - 1
    rows = (reader.read(raw, at, is_terminated=is_terminated or at < last) for at, raw in enumerate(lines, first))
    return _table(rows, stream)


def parse_values(values: Sequence[bytes | None], offsets: Ints, stream: str, suppressed: State = NOBODY) -> pa.Table:
    """Return the records of values by their ascending ``offsets``. A value is one record, whatever is in it."""
    reader = _LineReader(stream, None, suppressed)
    return _table((reader.read(value or b"", at) for value, at in zip(values, offsets.tolist(), strict=True)), stream)
