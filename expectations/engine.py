"""Runs Great Expectations' expectations on a DuckDB connection, through its SQLAlchemy execution engine.

Great Expectations ships no DuckDBDatasource. To explore an hour by hand use
``context.data_sources.add_duckdb(name, connection_string="duckdb:///file.duckdb")``.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import duckdb
from duckdb_engine import ConnectionWrapper
from great_expectations.core import ExpectationSuiteValidationResult, ExpectationValidationResult
from great_expectations.core.batch import Batch
from great_expectations.data_context.types.base import ProgressBarsConfig
from great_expectations.datasource.fluent import SQLDatasource
from great_expectations.execution_engine import SqlAlchemyExecutionEngine
from great_expectations.expectations.expectation import Expectation
from sqlalchemy.engine import Connection
from sqlalchemy.pool import StaticPool

from expectations._gx import gx
from expectations.custom import AgainstTheWeek
from expectations.errors import UnreadableTableError
from expectations.lake import one_line
from expectations.suites.suite import name_of

# the result of a rule that is met, for the data docs: no rule tolerates a share of unexpected rows
_NOTHING_UNEXPECTED = {"observed_value": 0, "unexpected_count": 0, "unexpected_percent": 0.0}


_DETAILED = {
    "result_format": "BASIC",
    "partial_unexpected_count": 0,  # Great Expectations' pages would show examples without escaping them
    "return_unexpected_index_query": True,
}


class DuckDBExecutionEngine(SqlAlchemyExecutionEngine):
    """Keeps one connection open, as Great Expectations does for SQLite.

    Great Expectations fetches a result after it has closed the connection. That fails for DuckDB, which computes results lazily.
    tests/expectations/test_engine.py fails once the base class no longer needs this.
    """

    @contextmanager
    def get_connection(self) -> Iterator[Connection]:
        """Yield the open connection."""
        if self._connection is None:
            self._connection = self.engine.connect()
        yield self._connection

    def release(self) -> None:
        """Give the connection back to SQLAlchemy, which ends its transaction."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Close the connection."""
        self.release()
        super().close()


class DuckDBDatasource(SQLDatasource):
    """A DuckDB database as a data source."""

    type: Literal["duckdb"] = "duckdb"  # type: ignore[assignment] # every data source narrows it

    @property
    def execution_engine_type(self) -> builtins.type[SqlAlchemyExecutionEngine]:
        """Return the engine that can fetch DuckDB's results."""
        return DuckDBExecutionEngine


class DuckDBValidator:
    """Validates tables and views that ``connection`` sees, temporary ones included. ``close`` closes the connection too."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        same_connection = {"poolclass": StaticPool, "creator": lambda: ConnectionWrapper(connection)}
        source = DuckDBDatasource(name="duckdb", connection_string="duckdb:///:memory:", kwargs=same_connection)
        self._source: Any = context.data_sources.add_or_update_duckdb(source)

    def close(self) -> None:
        """Close the connection, and what SQLAlchemy keeps of it."""
        self._source.get_execution_engine().close()

    def validate(
        self, table: str, expectations: Sequence[Expectation], place: Sequence[str], parameters: Mapping[str, Any]
    ) -> ExpectationSuiteValidationResult:
        """Validate a table. ``parameters``: values for the expectations' ``{"$PARAMETER": name}``.

        Great Expectations collects details (counts, and a query for the unexpected rows with the columns of ``place``) only for
        expectations that fail or measure: details of all would cost as much as the rest. Raises UnreadableTableError if an
        expectation cannot be evaluated.
        """
        measures = [each for each in expectations if isinstance(each, AgainstTheWeek)]
        rules = [each for each in expectations if not isinstance(each, AgainstTheWeek)]
        try:
            if table not in self._source.get_asset_names():
                self._source.add_table_asset(table).add_batch_definition_whole_table("rows")
            batch: Batch = self._source.get_asset(table).get_batch_definition("rows").get_batch()
            result = _run(batch, table, rules, "BOOLEAN_ONLY", parameters)
            failed = {name_of(each.expectation_config) for each in result.results if not each.success}
            for each in result.results:
                each.result = dict(_NOTHING_UNEXPECTED)
            wanted = [each for each in rules if name_of(each) in failed] + measures
            if wanted:
                again = _run(batch, table, wanted, _DETAILED | {"unexpected_index_column_names": list(place)}, parameters)
                by_name = {name_of(each.expectation_config): each for each in (*result.results, *again.results)}
                result.results = [by_name[name_of(each)] for each in expectations]
                result.success = all(each.success for each in result.results)
            return result
        finally:
            self._source.get_execution_engine().release()


def _run(
    batch: Batch, table: str, expectations: Sequence[Expectation], result_format: Any, parameters: Mapping[str, Any]
) -> ExpectationSuiteValidationResult:
    suite = gx.ExpectationSuite(name=table, expectations=list(expectations))
    result: ExpectationSuiteValidationResult = batch.validate(  # type: ignore[attr-defined]
        suite, result_format=result_format, expectation_parameters=dict(parameters)
    )
    for each in result.results:
        if error := _error(each.exception_info):
            raise UnreadableTableError(f"{table} cannot be checked: {one_line(error)}")
    return result


def unexpected_query(table: str, failed: ExpectationValidationResult) -> str | None:
    """Return a query for the rows that a detailed result found unexpected, or None if it is not about rows."""
    config = failed.expectation_config
    assert config is not None
    if "unexpected_rows_query" in config.kwargs:
        return str(config.kwargs["unexpected_rows_query"]).format(batch=table)
    query: str | None = failed.result.get("unexpected_index_query")
    return None if query is None else query.rstrip("; ")


def _error(info: Mapping[str, Any] | None) -> str | None:
    """Return the message of an exception that Great Expectations caught, if any: at the top, or one level below by metric."""
    for each in (info or {}, *(info or {}).values()):
        if isinstance(each, Mapping) and each.get("raised_exception"):
            return str(each.get("exception_message"))
    return None
