"""``adtally query``: SQL or a named query, of the marts in DuckDB or of Pinot."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote, urlsplit

import typer

from orchestration.cli import completion
from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, Panel, examples
from orchestration.cli.output import console, say
from spark_jobs.errors import AdtallyError, UsageError

if TYPE_CHECKING:
    from services.launcher.pinot import PinotClient
    from services.serving.named import NamedQuery

app = typer.Typer()

ROWS_SHOWN = 100
_PINOT_ROWS = 10
_SELECT = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/)*select\b", re.DOTALL | re.IGNORECASE)


class Format(StrEnum):
    """The forms in which a result is printed."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


class Engine(StrEnum):
    """The store that a query asks."""

    duckdb = "duckdb"
    pinot = "pinot"


@app.command(
    rich_help_panel=Panel.ASK,
    epilog=examples(
        "adtally query \"from fct_campaign_day where currency = 'USD' order by spend_micros desc limit 5\"",
        "adtally query 'from fct_event_accounting' --format csv > accounting.csv",
        "echo 'show tables' | adtally query -",
        "adtally query --list",
        "adtally query --engine pinot --named budget_pacing --param day=2025-06-02 --param campaign_id=c-0001",
        "adtally query --engine pinot 'select region, count(*) from ads_metrics group by region limit 100'",
    ),
)
def query(
    context: typer.Context,
    sql: Annotated[
        str | None,
        typer.Argument(metavar="SQL", help="One reading statement in the engine's SQL; - reads it from standard input."),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="The marts in DuckDB, or Pinot.")] = Engine.duckdb,
    named: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="In place of SQL: a named query, see --list.", autocompletion=completion.named_queries),
    ] = None,
    param: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A parameter of a named query.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the named queries, their parameters and columns.")] = False,
    broker: Annotated[
        str | None, typer.Option(metavar="URL", help="Pinot's broker. Default: the one of `adtally services pinot`.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How the result is printed.")] = Format.table,
    limit: Annotated[
        int | None,
        typer.Option(min=0, help="Rows that are printed, 0 for all. Default: 100 of a table, all of other formats."),
    ] = None,
    as_json: Json = False,
    is_raw: Annotated[
        bool,
        typer.Option("--raw", help="With csv: texts as they are, which a spreadsheet or a terminal may take for commands."),
    ] = False,
    with_build: Annotated[
        bool, typer.Option("--build/--no-build", help="Not in a table, from the marts: a last column mart_build, their build.")
    ] = True,
) -> None:
    """Ask the published marts, or Pinot.

    In DuckDB the statement sees one whole build; it can only read. Pinot gives 10 rows unless the statement says LIMIT, and
    its sum() is a double: sumprecision() is exact.
    """
    chosen = Format.json.value if as_json else form.value
    if list_:
        show_listing(chosen)
        return
    text = sys.stdin.read() if sql == "-" else sql
    is_export = with_build and chosen != Format.table.value
    columns, rows = run_query(context, text, engine.value, named, param or [], broker, is_export=is_export)
    show_rows(columns, rows, chosen, limit, is_raw=is_raw)


def run_query(
    context: typer.Context,
    sql: str | None,
    engine: str,
    named: str | None,
    params: Sequence[str],
    broker: str | None,
    *,
    is_export: bool = False,
) -> tuple[list[str], Sequence[Sequence[Any]]]:
    """Return the column names and rows of a statement, or of the query ``named`` with ``params`` as ``NAME=VALUE``.

    ``is_export``: add a last column with the build of the marts.

    Raises UsageError for wrong use, AdtallyError where the store does not answer.
    """
    if (sql is None) == (named is None):
        raise UsageError("a query is a statement or --named NAME", hint="`adtally query --list` lists the named ones")
    if params and named is None:
        raise UsageError("--param belongs to a named query", hint="`adtally query --list` lists them")
    if broker is not None and engine != "pinot":
        raise UsageError("--broker belongs to --engine pinot")
    if named is not None:
        return _run_named(context, named, _parameters(params), engine, broker, is_export)
    assert sql is not None
    if engine == "pinot":
        return _ask_pinot(context, broker, sql)
    from orchestration.marts import query_marts

    return query_marts(settings_of(context), sql, with_build=is_export)


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]], form: str, limit: int | None, *, is_raw: bool = False) -> None:
    """Print a result: ROWS_SHOWN rows of a table unless ``limit`` says otherwise (0: all). Say how many rows are left out."""
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
    context: typer.Context, name: str, given: dict[str, str], engine: str, broker: str | None, is_export: bool
) -> tuple[list[str], Sequence[Sequence[Any]]]:
    from orchestration.marts import query_marts
    from services.serving.named import ROW_LIMIT, named_query

    query = named_query(name)
    if engine == "pinot":
        query.values(given)  # report wrong use before looking for Pinot
        return query.ask_pinot(_pinot(context, broker), given, now=datetime.now(UTC))
    columns, rows = query_marts(settings_of(context), query.text(engine), query.values(given), with_build=is_export)
    if len(rows) >= ROW_LIMIT:
        raise AdtallyError(f"{name} has more than {ROW_LIMIT:,} rows", hint="narrow it with --param")
    return columns, rows


def _ask_pinot(context: typer.Context, broker: str | None, sql: str) -> tuple[list[str], list[list[Any]]]:
    from services.launcher.errors import PinotQueryError
    from services.serving.named import explained

    statement = sql.strip().removesuffix(";")
    if not _SELECT.match(statement):
        raise UsageError("Pinot is only read: the statement is one SELECT")
    if ";" in statement:  # within quotes too: where a text ends is for Pinot to say, and a second statement may write
        raise UsageError("Pinot is only read: one SELECT, without ; in it", hint="write a text with one as `decodeUrl`('%3B')")
    try:
        answer = _pinot(context, broker).ask(statement)
    except PinotQueryError as error:
        told = explained(error)
        raise UsageError(f"Pinot: {told.message.removeprefix('query failed: ')}", hint=told.hint) from None
    if len(answer.rows) == _PINOT_ROWS and not re.search(r"\blimit\b", statement, re.IGNORECASE):
        _warn(f"Pinot gives {_PINOT_ROWS} rows unless the statement says LIMIT: there may be more")
    return answer.columns, answer.rows


def _pinot(context: typer.Context, broker: str | None) -> PinotClient:
    from orchestration.cli.services import pinot_service
    from services.launcher.pinot import PinotClient

    if broker is None:
        return pinot_service(settings_of(context)).client
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

    with suppress(OSError):
        say(line, stderr=True)
