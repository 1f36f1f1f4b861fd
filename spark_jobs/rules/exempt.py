"""Finds exempt users: ids that mean "unknown". Different people share such an id, so two of its events say nothing.

Ignores the case of ASCII letters and surrounding blanks. Spark's Python workers import this module.
"""

from __future__ import annotations

from collections.abc import Iterable
from string import ascii_lowercase, ascii_uppercase
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, Field

from spark_jobs.lake.duck import literal

# the advertising id of a device whose owner has turned advertising ids off, in both forms
_NO_ADVERTISING_ID = ("00000000-0000-0000-0000-000000000000", "00000000000000000000000000000000")
PLACEHOLDERS = tuple(sorted(("", "-", "(not set)", "0", "nan", "none", "null", "undefined", "unknown", *_NO_ADVERTISING_ID)))
"""The users that are exempt by default: usual placeholders of trackers and mobile devices."""

_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)


def plain(user_id: str) -> str:
    """Return a user id in the form in which ids are compared."""
    return user_id.strip(" ").translate(_LOWER)


def _plain_list(users: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({plain(user) for user in users}))


ExemptUsers = Annotated[
    tuple[Annotated[str, Field(max_length=128)], ...],
    AfterValidator(_plain_list),
    Field(description="User ids that stand for nobody known: no repeats, no rates, no touches, no credit."),
]
"""A field of a rule set: ids in their compared form, sorted, each once."""


def is_exempt_sql(users: Iterable[str]) -> str:
    """Return SQL of whether column ``user_id`` is one of ``users``."""
    listed = ", ".join(literal(user) for user in users)
    return f"trim(translate(user_id, '{ascii_uppercase}', '{ascii_lowercase}'), ' ') in ({listed})" if listed else "false"


def are_exempt(user_ids: pa.ChunkedArray, users: Iterable[str]) -> pa.ChunkedArray:
    """Return for each of ``user_ids`` whether it is one of ``users``."""
    return pc.is_in(pc.ascii_lower(pc.ascii_trim(user_ids, " ")), value_set=pa.array(list(users), pa.string()))
