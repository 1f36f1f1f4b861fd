"""Narrow keys of records: a 128-bit hash of the id and a 64-bit fingerprint of the payload."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from spark_jobs.contract.spec import Contract, Kind
from spark_jobs.duck import query_arrow

Words = npt.NDArray[np.uint64]

_NULL = "chr(1)"
_SEPARATOR = "chr(31)"


@dataclass(frozen=True)
class Keys:
    """Keys of n records, in the order of the records: three uint64 arrays of length n."""

    low: Words
    high: Words
    fingerprint: Words

    def __len__(self) -> int:
        return len(self.low)

    def take(self, selection: npt.NDArray[Any]) -> Keys:
        """The keys at ``selection`` (indices or a mask)."""
        return Keys(self.low[selection], self.high[selection], self.fingerprint[selection])

    def to_bytes(self) -> bytes:
        """The three arrays behind one another, for the way to the driver."""
        return np.concatenate((self.low, self.high, self.fingerprint)).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Keys:
        """The inverse of ``to_bytes``."""
        return cls(*np.frombuffer(data, dtype=np.uint64).reshape(3, -1))

    @classmethod
    def concatenate(cls, parts: list[Keys]) -> Keys:
        """Keys of several splits, in order."""
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


def fingerprint_sql(contract: Contract) -> str:
    """SQL text of the canonical payload: every field but id, received_at and region, separated, null told from empty."""
    parts = []
    for spec in contract.payload:
        if spec.kind in (Kind.ID, Kind.TEXT):  # free text may hold the separator: its length goes before it
            text = f"strlen({spec.name})::varchar || ':' || {spec.name}"
        else:
            text = f"{spec.name}::varchar" if spec.kind in (Kind.INTEGER, Kind.TIME) else spec.name
        parts.append(text if spec.required or spec.kind is Kind.INTEGER else f"coalesce({text}, {_NULL})")
    return f" || {_SEPARATOR} || ".join(parts)


def id_hash_sql(column: str) -> str:
    """SQL of the two halves of the id's MD5."""
    return f"md5_number_lower({column}) as key_low, md5_number_upper({column}) as key_high"


def keys_of_ids(ids: pa.Table, id_column: str, fingerprint_column: str) -> Keys:
    """Keys from ids and stored fingerprints (int64, the same 64 bits): how the index is rebuilt from a table."""
    hashed = query_arrow(f"select {id_hash_sql(id_column)} from input", ids.select([id_column]))
    fingerprint = ids[fingerprint_column].to_numpy().astype(np.int64).view(np.uint64)
    return Keys(hashed["key_low"].to_numpy(), hashed["key_high"].to_numpy(), fingerprint)


def hex_fingerprint(value: int) -> str:
    """A fingerprint as people see it: 16 hex digits."""
    return f"{value & (2**64 - 1):016x}"
