"""``adtally query``: SQL or a named query, of the marts in DuckDB or of Pinot."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from spark_jobs.errors import AdtallyError, UsageError

if TYPE_CHECKING:
    from services.launcher.pinot import PinotClient
    from services.serving.named import NamedQuery
    from spark_jobs.config import Settings

ROWS_SHOWN = 100
_PINOT_ROWS = 10
_SELECT = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/)*select\b", re.DOTALL | re.IGNORECASE)


def run_query(
    settings: Callable[[], Settings],
    sql: str | None,
    engine: str,
    named: str | None,
    params: Sequence[str],
    broker: str | None,
    *,
    is_export: bool = False,
) -> tuple[list[str], Sequence[Sequence[Any]]]:
    """Column names and rows of a statement, or of the query ``named`` with ``params`` as ``NAME=VALUE``.

    ``is_export``: a last column says of which build of the marts each row is.

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
            return _run_named(settings, named, _parameters(params), engine, broker, is_export)
        assert sql is not None
        if engine == "pinot":
            return _ask_pinot(settings, broker, sql)
    from orchestration.marts import query_marts

    return query_marts(settings(), sql, with_build=is_export)


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]], form: str, limit: int | None, *, is_raw: bool = False) -> None:
    """Print a result. A table has ROWS_SHOWN rows unless ``limit`` says otherwise (0: all); what is left out is said."""
    from orchestration.cli.output import console
    from orchestration.marts import render

    wanted = ROWS_SHOWN if limit is None and form == "table" else limit
    shown = rows[:wanted] if wanted else rows
    if form == "parquet":
        from orchestration.marts.parquet import parquet

        if sys.stdout.isatty():
            raise UsageError("Parquet is not for a terminal", hint="add > result.parquet")
        sys.stdout.buffer.write(parquet(columns, shown))
        sys.stdout.buffer.flush()
    else:
        print(render(columns, shown, form, console().width if sys.stdout.isatty() else None, is_raw=is_raw))
    if len(shown) < len(rows):
        _warn(f"{len(shown):,} of {len(rows):,} rows: --limit 0 prints all, --format csv or parquet has all")


def show_listing(form: str) -> None:
    """Print all named queries: for a person to read, or as rows of the other formats."""
    from services.serving.named import named_queries

    queries = named_queries()
    if form == "table":
        print("\n".join(_listing(queries)))
        return
    columns = ("name", "engines", "meaning", "parameters", "columns")
    rows = [
        (query.name, list(query.engines), query.meaning, [asdict(one) for one in query.parameters], list(query.columns))
        for query in queries
    ]
    show_rows(columns, rows, form, None)


def _listing(queries: Iterable[NamedQuery]) -> Iterator[str]:
    for query in queries:
        yield f"{query.name}  ({', '.join(query.engines)}): {query.meaning}"
        for one in query.parameters:
            need = "needed" if one.is_required else f"default {one.default}" if one.default else "optional"
            yield f"    --param {one.name}=  {one.meaning} ({need})"
        yield f"    columns: {', '.join(query.columns)}"


def _run_named(
    settings: Callable[[], Settings], name: str, given: dict[str, str], engine: str, broker: str | None, is_export: bool
) -> tuple[list[str], Sequence[Sequence[Any]]]:
    from orchestration.marts import query_marts
    from services.serving.named import ROW_LIMIT, named_query

    query = named_query(name)
    if engine == "pinot":
        query.values(given)  # wrong use is told before Pinot is looked for
        return query.ask_pinot(_pinot(settings, broker), given, now=datetime.now(UTC))
    columns, rows = query_marts(settings(), query.text(engine), query.values(given), with_build=is_export)
    if len(rows) >= ROW_LIMIT:
        raise AdtallyError(f"{name} has more than {ROW_LIMIT:,} rows", hint="narrow it with --param")
    return columns, rows


def _ask_pinot(settings: Callable[[], Settings], broker: str | None, sql: str) -> tuple[list[str], list[list[Any]]]:
    from services.launcher.errors import PinotQueryError
    from services.serving.named import explained

    statement = sql.strip().removesuffix(";")
    if not _SELECT.match(statement):
        raise UsageError("Pinot is only read: the statement is one SELECT")
    if ";" in statement:  # within quotes too: where a text ends is for Pinot to say, and a second statement may write
        raise UsageError("Pinot is only read: one SELECT, without ; in it", hint="write a text with one as `decodeUrl`('%3B')")
    try:
        answer = _pinot(settings, broker).ask(statement)
    except PinotQueryError as error:
        told = explained(error)
        raise UsageError(f"Pinot: {told.message.removeprefix('query failed: ')}", hint=told.hint) from None
    if len(answer.rows) == _PINOT_ROWS and not re.search(r"\blimit\b", statement, re.IGNORECASE):
        _warn(f"Pinot gives {_PINOT_ROWS} rows unless the statement says LIMIT: there may be more")
    return answer.columns, answer.rows


def _pinot(settings: Callable[[], Settings], broker: str | None) -> PinotClient:
    from orchestration.cli.services import pinot_service
    from services.launcher.pinot import PinotClient

    if broker is None:
        return pinot_service(settings()).client
    url = urlsplit(broker)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UsageError(
            f"--broker {broker!r} is not a URL", hint="as in http://127.0.0.1:8099, or http://USER:PASSWORD@127.0.0.1:8099"
        )
    login = None if url.username is None else (unquote(url.username), unquote(url.password or ""))
    return PinotClient("", url._replace(netloc=url.netloc.rpartition("@")[2]).geturl().rstrip("/"), login)


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
        console(stderr=True).print(line, soft_wrap=True)
