"""The command ``adtally query``: SQL or a named query, against the marts in DuckDB or against Pinot."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote, urlsplit

import typer

from orchestration.cli import completion
from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, Panel, examples
from orchestration.cli.output import console, say
from spark_jobs.errors import AdtallyError, UsageError

if TYPE_CHECKING:
    from services.launcher.pinot import PinotClient

app = typer.Typer()

Rows = Sequence[Sequence[object]]

ROWS_SHOWN = 100
_PINOT_ROWS = 10
_SELECT = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/)*select\b", re.DOTALL | re.IGNORECASE)


class Format(StrEnum):
    """The output formats."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


class Engine(StrEnum):
    """The stores that answer queries."""

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
        str | None, typer.Argument(metavar="SQL", help="One reading statement in the engine's SQL; - reads it from standard input.")
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
    form: Annotated[Format, typer.Option("--format", help="The output format.")] = Format.table,
    limit: Annotated[
        int | None, typer.Option(min=0, help="Rows to print, 0 for all. Default: 100 as a table, all in other formats.")
    ] = None,
    as_json: Json = False,
    is_raw: Annotated[
        bool, typer.Option("--raw", help="With csv: print texts unchanged. A spreadsheet or a terminal may run them as commands.")
    ] = False,
    with_build: Annotated[
        bool,
        typer.Option("--build/--no-build", help="For the marts, except as a table: a last column mart_build with their build."),
    ] = True,
) -> None:
    """Query the published marts, or Pinot.

    In DuckDB the statement sees one whole build and can only read. Pinot returns 10 rows unless the statement says LIMIT, and
    its sum() is a double: sumprecision() is exact.
    """
    chosen = Format.json if as_json else form
    if list_:
        show_listing(chosen)
        return
    if (sql is None) == (named is None):
        raise UsageError("a query is a statement or --named NAME", hint="`adtally query --list` lists the named ones")
    if param and named is None:
        raise UsageError("--param belongs to a named query", hint="`adtally query --list` lists them")
    if broker is not None and engine is not Engine.pinot:
        raise UsageError("--broker belongs to --engine pinot")
    with_column = with_build and chosen is not Format.table
    if named is not None:
        columns, rows = _run_named(context, named, _parameters(param or []), engine, broker, with_column)
    else:
        columns, rows = _run_sql(context, sys.stdin.read() if sql == "-" else sql or "", engine, broker, with_column)
    show_rows(columns, rows, chosen, limit, is_raw=is_raw)


def show_rows(columns: Sequence[str], rows: Rows, form: Format, limit: int | None, *, is_raw: bool = False) -> None:
    """Print a result, and how many rows were left out. ``limit`` None: ROWS_SHOWN rows of a table, else all; 0: all."""
    from orchestration.marts.render import render

    wanted = ROWS_SHOWN if limit is None and form is Format.table else limit
    shown = rows[:wanted] if wanted else rows
    if form is Format.parquet:
        from orchestration.marts.parquet import parquet

        if sys.stdout.isatty():
            raise UsageError("Parquet is not for a terminal", hint="add > result.parquet")
        sys.stdout.buffer.write(parquet(columns, shown))
        sys.stdout.buffer.flush()
    else:
        print(render(columns, shown, form.value, console().width if sys.stdout.isatty() else None, is_raw=is_raw))
    if len(shown) < len(rows):
        _warn(f"{len(shown):,} of {len(rows):,} rows: --limit 0 prints all, --format csv or parquet has all")


def show_listing(form: Format) -> None:
    """Print all named queries: as lines for a person, or as rows in the other formats."""
    from services.serving.named import named_queries

    queries = named_queries()
    if form is Format.table:
        for query in queries:
            print(f"{query.name}  ({', '.join(query.engines)}): {query.meaning}")
            for parameter in query.parameters:
                default = f"default {parameter.default}" if parameter.default else "optional"
                need = "needed" if parameter.is_required else default
                print(f"    --param {parameter.name}=  {parameter.meaning} ({need})")
            print(f"    columns: {', '.join(query.columns)}")
        return
    columns = ("name", "engines", "meaning", "parameters", "columns")
    rows = [
        (query.name, list(query.engines), query.meaning, list(map(asdict, query.parameters)), list(query.columns))
        for query in queries
    ]
    show_rows(columns, rows, form, None)


def _run_named(
    context: typer.Context, name: str, given: dict[str, str], engine: Engine, broker: str | None, with_build: bool
) -> tuple[list[str], Rows]:
    from orchestration.marts import query_marts
    from services.serving.named import ROW_LIMIT, named_query

    query = named_query(name)
    values = query.values(given)  # reports wrong use before looking for Pinot
    if engine is Engine.pinot:
        return query.ask_pinot(_pinot(context, broker), given, now=datetime.now(UTC))
    columns, rows = query_marts(settings_of(context), query.text(engine), values, with_build=with_build)
    if len(rows) >= ROW_LIMIT:
        raise AdtallyError(f"{name} has more than {ROW_LIMIT:,} rows", hint="narrow it with --param")
    return columns, rows


def _run_sql(context: typer.Context, sql: str, engine: Engine, broker: str | None, with_build: bool) -> tuple[list[str], Rows]:
    from services.launcher.errors import PinotQueryError
    from services.serving.named import add_hint

    if engine is Engine.duckdb:
        from orchestration.marts import query_marts

        return query_marts(settings_of(context), sql, with_build=with_build)
    statement = sql.strip().removesuffix(";")
    if not _SELECT.match(statement):
        raise UsageError("Pinot is only read: the statement is one SELECT")
    if ";" in statement:  # also within quotes: only Pinot knows where a text ends, and a second statement may write
        raise UsageError("Pinot is only read: one SELECT, without ; in it", hint="write a text with one as `decodeUrl`('%3B')")
    try:
        answer = _pinot(context, broker).ask(statement)
    except PinotQueryError as error:
        explained = add_hint(error)
        raise UsageError(f"Pinot: {explained.message.removeprefix('query failed: ')}", hint=explained.hint) from None
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
        hint = "as in http://127.0.0.1:8099, or http://USER:PASSWORD@127.0.0.1:8099"
        raise UsageError(f"--broker {broker!r} is not a URL", hint=hint)
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
