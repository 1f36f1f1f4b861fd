"""Narrow keys of records: a 128-bit hash of the id and a 64-bit fingerprint of the payload."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from xxhash import xxh3_64_hexdigest

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
        order = np.argsort(self.low)  # a fifth of the time of a stable sort; the few that are equal are sorted again
        is_same = np.diff(self.low[order]) == 0
        tied = np.flatnonzero(np.concatenate((is_same, [False])) | np.concatenate(([False], is_same)))
        again = order[tied]
        order[tied] = again[np.lexsort((again, self.high[again], self.low[again]))]
        return order

    @property
    def checksum(self) -> str:
        """A checksum that does not depend on the order of the keys."""
        return xxh3_64_hexdigest(np.column_stack((self.low, self.high, self.fingerprint))[self.order].tobytes())

    def are(self, keys: Keys) -> bool:
        """Return whether these are the same keys and fingerprints, in any order."""
        return len(self) == len(keys) and self.checksum == keys.checksum


def hash_keys(records: pa.Table, contract: Contract) -> pa.Table:
    """Return key_low and key_high (the halves of the id's MD5) and fingerprint (half of the payload's MD5) of records, uint64."""
    texts = pa.table({"id": records[contract.id_field], "payload": _payloads(records, contract)})
    return query_arrow(
        f"select {_ID_HALVES}, (payload >> 64)::ubigint as fingerprint "
        "from (select md5_number(id) as digest, md5_number(payload) as payload from input)",
        texts,
    )


def _payloads(records: pa.Table, contract: Contract) -> pa.ChunkedArray:
    """Return the canonical payloads: every field but id, received_at and region, separated by 0x1F, null as 0x01.

    0x01 in a text becomes 0x01 and e, and 0x1F becomes 0x01 and s, so that no two payloads give the same text. Hardly any text has
    such a character.
    """
    is_escaped = _has_control_characters(records, contract)
    columns = []
    for spec in contract.payload:
        text = records[spec.name]
        if spec.kind in (FieldKind.INTEGER, FieldKind.TIME):
            text = text.cast(pa.string())
        elif is_escaped and spec.kind in (FieldKind.ID, FieldKind.TEXT):
            text = pc.replace_substring(pc.replace_substring(text, "\x01", "\x01e"), "\x1f", "\x01s")
        columns.append(pc.fill_null(text, "\x01") if text.null_count else text)
    return pc.binary_join_element_wise(*columns, "\x1f")


def _has_control_characters(records: pa.Table, contract: Contract) -> bool:
    names = [spec.name for spec in contract.payload if spec.kind in (FieldKind.ID, FieldKind.TEXT)]
    buffers = [chunk.buffers()[2] for name in names for chunk in records[name].chunks if len(chunk)]
    return any(buffer and np.frombuffer(buffer, dtype=np.uint8).min() < 32 for buffer in buffers)


# md5_number_lower and md5_number_upper would compute the digest twice each
_ID_HALVES = "(digest & 18446744073709551615)::ubigint as key_low, (digest >> 64)::ubigint as key_high"


def keys_of_ids(ids: pa.Table, id_column: str, fingerprint_column: str) -> Keys:
    """Return keys of ids and stored fingerprints (int64, the same 64 bits), to rebuild the index from a table."""
    hashed = query_arrow(f"select {_ID_HALVES} from (select md5_number({id_column}) as digest from input)", ids.select([id_column]))
    fingerprint = ids[fingerprint_column].to_numpy().astype(np.int64).view(np.uint64)
    return Keys(hashed["key_low"].to_numpy(), hashed["key_high"].to_numpy(), fingerprint)


def hex_fingerprint(value: int) -> str:
    """Format a fingerprint as 16 hex digits."""
    return f"{value & (2**64 - 1):016x}"
