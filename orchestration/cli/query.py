"""``adtally query``: SQL or a named query, of the marts in DuckDB or of Pinot."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from spark_jobs.errors import AdtallyError, UsageError

if TYPE_CHECKING:
    from services.launcher.pinot import PinotClient
    from spark_jobs.config import Settings

_PINOT_ROWS = 10
_COMMENTS = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)


def run_query(
    settings: Callable[[], Settings], sql: str | None, engine: str, named: str | None, params: Sequence[str], broker: str | None
) -> tuple[list[str], Sequence[Sequence[Any]]]:
    """Column names and rows of a statement, or of the query ``named`` with ``params`` as ``NAME=VALUE``.

    Raises UsageError for wrong use, AdtallyError where the store does not answer.
    """
    from orchestration.cli.services import one_line

    if (sql is None) == (named is None):
        raise UsageError("a query is a statement or --named NAME", hint="`adtally query --list` lists the named ones")
    if params and named is None:
        raise UsageError("--param belongs to a named query", hint="`adtally query --list` lists them")
    if broker is not None and engine != "pinot":
        raise UsageError("--broker belongs to --engine pinot")
    with one_line():
        if named is not None:
            return _run_named(settings, named, _parameters(params), engine, broker)
        assert sql is not None
        if engine == "pinot":
            return _ask_pinot(settings, broker, sql)
    from orchestration.marts import query_marts

    return query_marts(settings(), sql)


def listing() -> str:
    """All named queries for a person to read."""
    from services.serving.named import named_queries

    lines = []
    for query in named_queries():
        lines.append(f"{query.name}  ({', '.join(query.engines)}): {query.meaning}")
        for one in query.parameters:
            need = "needed" if one.is_required else f"default {one.default}" if one.default else "optional"
            lines.append(f"    --param {one.name}=  {one.meaning} ({need})")
        lines.append(f"    columns: {', '.join(query.columns)}")
    return "\n".join(lines)


def _run_named(
    settings: Callable[[], Settings], name: str, given: dict[str, str], engine: str, broker: str | None
) -> tuple[list[str], Sequence[Sequence[Any]]]:
    from orchestration.marts import query_marts
    from services.serving.named import ROW_LIMIT, named_query

    query = named_query(name)
    if engine == "pinot":
        query.values(given)  # wrong use is told before Pinot is looked for
        return query.ask_pinot(_pinot(settings, broker), given, now=datetime.now(UTC))
    columns, rows = query_marts(settings(), query.text(engine), query.values(given))
    if len(rows) >= ROW_LIMIT:
        raise AdtallyError(f"{name} has more than {ROW_LIMIT:,} rows", hint="narrow it with --param")
    return columns, rows


def _ask_pinot(settings: Callable[[], Settings], broker: str | None, sql: str) -> tuple[list[str], list[list[Any]]]:
    from services.launcher.errors import PinotQueryError
    from services.serving.named import explained

    words = _COMMENTS.sub(" ", sql).split()
    if not words or words[0].lower() not in ("select", "explain", "set"):
        raise UsageError("Pinot is only read: the statement begins with SELECT, EXPLAIN or SET")
    try:
        answer = _pinot(settings, broker).ask(sql)
    except PinotQueryError as error:
        told = explained(error)
        raise UsageError(f"Pinot: {told.message.removeprefix('query failed: ')}", hint=told.hint) from None
    if len(answer.rows) == _PINOT_ROWS and "limit" not in (word.lower() for word in words):
        _warn(f"Pinot gives {_PINOT_ROWS} rows unless the statement says LIMIT: there may be more")
    return answer.columns, answer.rows


def _pinot(settings: Callable[[], Settings], broker: str | None) -> PinotClient:
    from orchestration.cli.services import pinot_service
    from services.launcher.pinot import PinotClient

    if broker is None:
        return pinot_service(settings()).client
    if not re.match(r"https?://[^/]+", broker):
        raise UsageError(f"--broker {broker!r} is not a URL", hint="as in http://127.0.0.1:8099")
    return PinotClient("", broker.rstrip("/"))


def _parameters(params: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for text in params:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise UsageError(f"--param {text!r} is not NAME=VALUE")
        if name in given:
            raise UsageError(f"--param {name} is given twice")
        given[name] = value
    return given


def _warn(line: str) -> None:
    from orchestration.cli.output import console

    with suppress(OSError):
        console(stderr=True).print(line, markup=False, soft_wrap=True)
