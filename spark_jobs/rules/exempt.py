"""Users that are nobody: ids that stand for "unknown". Strangers share them, so nothing may be concluded from two of their events.

Case of ASCII letters and surrounding blanks do not matter. Must stay importable in Spark's Python workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from string import ascii_lowercase, ascii_uppercase
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, Field

from spark_jobs.lake.duck import literal

PLACEHOLDERS = tuple(
    sorted(
        (
            *("", "-", "(not set)", "0", "nan", "none", "null", "undefined", "unknown"),
            # the advertising id of a device whose owner has turned advertising ids off
            *("00000000-0000-0000-0000-000000000000", "00000000000000000000000000000000"),
        )
    )
)
"""Exempt by default: the usual placeholders of trackers and mobile devices."""

_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)


def plain(user_id: str) -> str:
    """A user id as it is compared."""
    return user_id.strip(" ").translate(_LOWER)


def _plain_list(users: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({plain(user) for user in users}))


ExemptUsers = Annotated[
    tuple[Annotated[str, Field(max_length=128)], ...],
    AfterValidator(_plain_list),
    Field(description="User ids that stand for nobody known: no repeats, no rates, no touches, no credit."),
]
"""A field of a rule set: compared plain, in order, each once."""


def is_exempt_sql(users: Iterable[str]) -> str:
    """SQL that says whether column ``user_id`` is one of ``users``."""
    listed = ", ".join(literal(user) for user in users)
    return f"trim(translate(user_id, '{ascii_uppercase}', '{ascii_lowercase}'), ' ') in ({listed})" if listed else "false"


def are_exempt(user_ids: pa.ChunkedArray, users: Iterable[str]) -> pa.ChunkedArray:
    """Booleans: which of ``user_ids`` are among ``users``."""
    return pc.is_in(pc.ascii_lower(pc.ascii_trim(user_ids, " ")), value_set=pa.array(list(users), pa.string()))
