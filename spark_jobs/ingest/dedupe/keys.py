"""Narrow keys of records: a 128-bit hash of the id and a 64-bit fingerprint of the payload."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_jobs.ingest.contract.spec import Contract, FieldKind
from spark_jobs.lake.duck import query_arrow

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Keys:
    """The keys of records, in the order of the records: three parallel arrays."""

    low: Words
    high: Words
    fingerprint: Words

    def __len__(self) -> int:
        return len(self.low)

    def take(self, selection: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Keys:
        """Return the keys at ``selection`` (indices or a mask)."""
        return Keys(self.low[selection], self.high[selection], self.fingerprint[selection])

    @classmethod
    def concatenate(cls, parts: list[Keys]) -> Keys:
        """Join the keys of several splits, in order."""
        if not parts:
            return cls(*(np.empty(0, dtype=np.uint64) for _ in range(3)))
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("low", "high", "fingerprint")))

    @cached_property
    def order(self) -> npt.NDArray[np.int64]:
        """Indices that sort by (low, high), equal keys in the order of the records."""
        order = np.argsort(self.low, kind="stable")
        low, high = self.low[order], self.high[order]
        if np.any((low[1:] == low[:-1]) & (high[1:] != high[:-1])):
            order = np.lexsort((self.high, self.low))
        return order


def hash_keys(records: pa.Table, contract: Contract) -> pa.Table:
    """Return key_low and key_high (the halves of the id's MD5) and fingerprint (half of the payload's MD5) of records, uint64."""
    payload = _fingerprint_sql(contract, escaped=_has_control_characters(records, contract))
    return query_arrow(
        f"select {_ID_HALVES}, md5_number_lower(payload) as fingerprint from ({_hashed(contract.id_field, payload)})", records
    )


def _fingerprint_sql(contract: Contract, *, escaped: bool) -> str:
    """Return SQL for the canonical payload: every field but id, received_at and region, separated by 0x1F, null as 0x01.

    ``escaped`` writes 0x01 in a text as 0x01 and e, and 0x1F as 0x01 and s, so that no two payloads give the same text. Without
    these characters, which is nearly always, the result is the same and faster to compute unescaped.
    """
    parts = []
    for spec in contract.payload:
        text = spec.name
        if spec.kind in (FieldKind.INTEGER, FieldKind.TIME):
            text = f"{spec.name}::varchar"
        elif escaped and spec.kind in (FieldKind.ID, FieldKind.TEXT):
            text = f"replace(replace({spec.name}, chr(1), chr(1) || 'e'), chr(31), chr(1) || 's')"
        parts.append(text if spec.required or spec.kind is FieldKind.INTEGER else f"coalesce({text}, chr(1))")
    return f"concat_ws(chr(31), {', '.join(parts)})"


def _has_control_characters(records: pa.Table, contract: Contract) -> bool:
    names = [spec.name for spec in contract.payload if spec.kind in (FieldKind.ID, FieldKind.TEXT)]
    buffers = [chunk.buffers()[2] for name in names for chunk in records[name].chunks if len(chunk)]
    return any(buffer and np.frombuffer(buffer, dtype=np.uint8).min() < 32 for buffer in buffers)


# computes the digest once: md5_number_lower and md5_number_upper would compute it twice
_ID_HALVES = "(digest & 18446744073709551615)::ubigint as key_low, (digest >> 64)::ubigint as key_high"


def _hashed(id_column: str, payload: str = "''") -> str:
    return f"select md5_number({id_column}) as digest, {payload} as payload from input"


def keys_of_ids(ids: pa.Table, id_column: str, fingerprint_column: str) -> Keys:
    """Return keys of ids and stored fingerprints (int64, the same 64 bits), to rebuild the index from a table."""
    hashed = query_arrow(f"select {_ID_HALVES} from ({_hashed(id_column)})", ids.select([id_column]))
    fingerprint = ids[fingerprint_column].to_numpy().astype(np.int64).view(np.uint64)
    return Keys(hashed["key_low"].to_numpy(), hashed["key_high"].to_numpy(), fingerprint)


def hex_fingerprint(value: int) -> str:
    """Format a fingerprint as 16 hex digits."""
    return f"{value & (2**64 - 1):016x}"
