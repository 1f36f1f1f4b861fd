"""Parses TOML files of operators."""

from __future__ import annotations

import tomllib
from typing import Any

_DEEPEST = 50


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML. Raises tomllib.TOMLDecodeError for whatever is wrong, also for tables nested deeper than any file of ours needs.

    tomllib itself raises RecursionError for deep lists, and ValueError for a number with thousands of digits.
    """
    try:
        parsed = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise tomllib.TOMLDecodeError("it is nested too deeply") from None
    except ValueError as error:
        raise tomllib.TOMLDecodeError(str(error)) from None
    level: list[Any] = [parsed]
    for _ in range(_DEEPEST):
        inner = (part for value in level for part in (value.values() if isinstance(value, dict) else value))
        level = [part for part in inner if isinstance(part, dict | list)]
    if level:
        raise tomllib.TOMLDecodeError("it is nested too deeply")
    return parsed
