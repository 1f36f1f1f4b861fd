"""Parse the lines of a split into columns: the fast validator first, then the exact one for the lines that the fast one leaves."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.erasure.suppression import Suppression
from spark_jobs.ingest.contract.exact import LineVerdict, validate_line
from spark_jobs.ingest.contract.spec import MAX_LINE_BYTES, MAX_RAW_BYTES, BatchLimits, Contract
from spark_jobs.ingest.contract.vectorised import accept_plain, flat_lines, parsed_schema
from spark_jobs.ingest.files.lines import FileFault, Lines, LongLine

_SHORT = 64  # bytes: verdicts of lines so short are cached, because a flood often repeats one line
_VERDICTS_KEPT = 1000


@dataclass
class Reject:
    """A line that is not accepted. ``number`` counts from 0 within the split, -1 for the file as a whole."""

    number: int
    reasons: list[str]
    raw: str
    raw_encoding: str
    raw_size_bytes: int
    record_id: str | None = None
    time_us: int | None = None


@dataclass
class Parsed:
    """A chunk of a split: ``valid`` has n (line number within the split, int64) and the contract's fields, by n.

    If only so many rejects of a kind are kept, a line that occurs more often in the chunk is in ``rejects`` as often as it can be
    kept, and once in ``repeats``, with the number of its further occurrences.
    """

    offered: int
    valid: pa.Table
    rejects: list[Reject] = field(default_factory=list)
    repeats: list[tuple[Reject, int]] = field(default_factory=list)


def encode_raw(raw: bytes) -> tuple[str, str]:
    """Return ``raw`` as text, and its encoding: utf-8, or base64 if it is not UTF-8 or has a NUL."""
    kept = raw[:MAX_RAW_BYTES]
    if b"\0" not in kept:
        try:
            return kept.decode("utf-8"), "utf-8"
        except UnicodeDecodeError:
            pass
    return base64.b64encode(kept).decode("ascii"), "base64"


def decode_raw(raw: str, encoding: str) -> bytes:
    """Return the bytes that ``encode_raw`` encoded (up to the size that it keeps)."""
    return binascii.a2b_base64(raw) if encoding == "base64" else raw.encode("utf-8")


def _reject(number: int, raw: bytes, verdict: LineVerdict, size: int | None = None) -> Reject:
    text, encoding = encode_raw(raw)
    return Reject(number, verdict.reasons, text, encoding, len(raw) if size is None else size, verdict.record_id, verdict.time_us)


def parse_chunk(
    chunk: Lines | LongLine | FileFault,
    contract: Contract,
    folder_region: str,
    limits: BatchLimits,
    *,
    own_region: bool = False,
    suppression: Suppression | None = None,
) -> Parsed:
    """Judge every line of a chunk. offered = valid rows + rejects. ``own_region`` is as in ``validate_line``.

    ``suppression`` replaces the ids of erased people in valid rows and in the texts of rejects. The verdicts are those of the lines
    as they came.
    """
    parsed = _parse_chunk(chunk, contract, folder_region, limits, own_region)
    if suppression is None:
        return parsed
    rejects = [_suppress(reject, suppression) for reject in parsed.rejects]
    repeats = [(_suppress(reject, suppression), count) for reject, count in parsed.repeats]
    return Parsed(parsed.offered, suppression.apply(parsed.valid), rejects, repeats)


def _suppress(reject: Reject, suppression: Suppression) -> Reject:
    raw = decode_raw(reject.raw, reject.raw_encoding)
    changed = suppression.line(raw)
    if changed == raw:
        return reject
    text, encoding = encode_raw(changed)
    return replace(reject, raw=text, raw_encoding=encoding, raw_size_bytes=reject.raw_size_bytes + len(changed) - len(raw))


def _parse_chunk(
    chunk: Lines | LongLine | FileFault, contract: Contract, folder_region: str, limits: BatchLimits, own_region: bool
) -> Parsed:
    if isinstance(chunk, Lines):
        return _parse_lines(chunk, contract, folder_region, limits, own_region)
    if isinstance(chunk, LongLine):
        reject = _reject(chunk.number, chunk.head, LineVerdict(["line_too_long"]), chunk.size)
    else:
        reject = _reject(-1 if chunk.nothing_read else chunk.number, chunk.rest, LineVerdict([chunk.reason]))
    return Parsed(1, parsed_schema(contract).empty_table(), [reject])


def _parse_lines(chunk: Lines, contract: Contract, folder_region: str, limits: BatchLimits, own_region: bool) -> Parsed:
    count = len(chunk.ends)
    offsets = np.zeros(count + 1, dtype=np.int32)
    offsets[1:] = chunk.ends
    sizes = np.diff(offsets)
    flat = flat_lines(chunk.data, chunk.ends)
    plain = flat & (sizes <= MAX_LINE_BYTES + 1)
    if not chunk.terminated:
        plain[-1] = False
    if not chunk.data.isascii():
        plain &= _valid_utf8(chunk)
    column = pa.Array.from_buffers(pa.string(), count, [None, pa.py_buffer(offsets), pa.py_buffer(chunk.data)])
    numbers = np.arange(count, dtype=np.int64)
    lines = pa.table({"n": numbers, "line": column})
    if not plain.all():
        lines = lines.filter(pa.array(plain))
    accepted = accept_plain(lines, contract, folder_region, limits, own_region=own_region)
    taken = np.zeros(count, dtype=bool)
    taken[accepted["n"].to_numpy()] = True

    rejects: list[Reject] = []
    repeats: list[tuple[Reject, int]] = []
    kept: dict[str, list[Any]] = {name: [] for name in parsed_schema(contract).names}
    left = np.flatnonzero(~taken)
    most = count if limits.rejects_kept is None else limits.rejects_kept + 1  # of lines with the same text
    blank = left[(sizes[left] == 1) & (chunk.terminated | (left < count - 1))]
    if len(blank) > most:
        left = np.setdiff1d(left, blank[most:], assume_unique=True)
        verdict = validate_line(b"", contract, folder_region, limits, own_region=own_region)
        repeats.append((_reject(-1, b"", verdict), len(blank) - most))
    known: dict[bytes, tuple[LineVerdict, int]] = {}
    for index in left.tolist():
        raw = chunk.raw(index)
        terminated = chunk.terminated or index < count - 1
        before = known.get(raw) if terminated else None
        if before is not None:
            verdict, seen = before
            known[raw] = (verdict, seen + 1)
            if seen >= most:
                continue
        else:
            verdict = validate_line(raw, contract, folder_region, limits, terminated=terminated, own_region=own_region)
            if verdict.values is None and terminated and len(raw) <= _SHORT and len(known) < _VERDICTS_KEPT:
                known[raw] = (verdict, 1)
        if verdict.values is None:
            rejects.append(_reject(chunk.number(index), raw, verdict))
            continue
        kept["n"].append(index)
        for name, value in verdict.values.items():
            kept[name].append(value)
    repeats += [(_reject(-1, raw, verdict), seen - most) for raw, (verdict, seen) in known.items() if seen > most]
    if kept["n"]:
        extra = pa.table(kept, schema=parsed_schema(contract))
        accepted = pa.concat_tables([accepted, extra]).sort_by("n")
    if chunk.numbers is not None:
        accepted = accepted.set_column(0, "n", pa.array(chunk.numbers[accepted["n"].to_numpy()]))
    elif chunk.first:
        accepted = accepted.set_column(0, "n", pc.add(accepted["n"], chunk.first))
    return Parsed(count, accepted, rejects, repeats)


def _valid_utf8(chunk: Lines) -> npt.NDArray[np.bool_]:
    if _is_utf8(chunk.data):
        return np.ones(len(chunk.ends), dtype=bool)
    return np.array([_is_utf8(chunk.raw(index)) for index in range(len(chunk.ends))])


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def parse_all(
    chunks: Iterator[Lines | LongLine | FileFault],
    contract: Contract,
    folder_region: str,
    limits: BatchLimits,
    *,
    own_region: bool = False,
    suppression: Suppression | None = None,
) -> Iterator[Parsed]:
    """Yield ``parse_chunk`` of each chunk of a split."""
    for chunk in chunks:
        yield parse_chunk(chunk, contract, folder_region, limits, own_region=own_region, suppression=suppression)
