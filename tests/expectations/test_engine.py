"""Great Expectations on DuckDB: what it does out of the box, what our engine adds, and how it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import duckdb
import pytest
from great_expectations.execution_engine import SqlAlchemyExecutionEngine

from expectations._gx import gx, gxe
from expectations.custom import ExpectNoRows
from expectations.engine import DuckDBExecutionEngine, DuckDBValidator, unexpected_query
from expectations.errors import UnreadableTableError
from expectations.suites.suite import check


@pytest.fixture
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as made:
        made.execute("create temp table numbers as select n, n * 2 as twice from range(10) as numbers(n)")
        yield made


@pytest.fixture
def validator(connection: duckdb.DuckDBPyConnection) -> Iterator[DuckDBValidator]:
    """Kept by the test: Great Expectations closes the connection once a validator that nobody holds is collected."""
    with closing(DuckDBValidator(connection)) as made:
        yield made


BELOW_5 = gxe.ExpectColumnValuesToBeBetween(column="n", max_value=4, **check("n.below_5", "n is below 5"))


def test_great_expectations_still_fetches_from_a_closed_connection(
    validator: DuckDBValidator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, Great Expectations can do without DuckDBExecutionEngine.get_connection: remove it."""
    assert validator.validate("numbers", [BELOW_5], ["n"], {}).results[0].success is False
    monkeypatch.setattr(DuckDBExecutionEngine, "get_connection", SqlAlchemyExecutionEngine.get_connection)
    with pytest.raises(Exception, match=r"list index out of range|already closed"):
        validator.validate("numbers", [BELOW_5], ["n"], {})


def test_the_rows_of_a_failed_expectation_can_be_queried(connection: duckdb.DuckDBPyConnection, validator: DuckDBValidator) -> None:
    odd = ExpectNoRows(unexpected_rows_query="select n from {batch} where n % 2 = 1", **check("n.even", "n is even"))
    result = validator.validate("numbers", [BELOW_5, odd], ["n", "twice"], {})
    below, even = result.results
    assert (below.result["unexpected_count"], even.result["observed_value"]) == (5, 5)
    assert below.result["partial_unexpected_list"] == []
    of_below, of_even = unexpected_query("numbers", below), unexpected_query("numbers", even)
    assert connection.execute(f"select n, twice from ({of_below}) order by n limit 1").fetchall() == [(5, 10)]
    assert connection.execute(f"select n from ({of_even}) order by n limit 1").fetchall() == [(1,)]


def test_an_expectation_that_cannot_be_evaluated_is_an_error(validator: DuckDBValidator) -> None:
    for wrong in (
        ExpectNoRows(unexpected_rows_query="select nothing from {batch}", **check("nothing.rule", "nothing")),
        gxe.ExpectColumnValuesToNotBeNull(column="nothing", **check("nothing.not_null", "nothing")),
    ):
        with pytest.raises(UnreadableTableError, match=r"numbers cannot be checked: .*nothing"):
            validator.validate("numbers", [wrong], ["n"], {})


def test_a_person_can_use_the_data_source_in_a_context_of_their_own(tmp_path) -> None:
    file = tmp_path / "some.duckdb"
    with duckdb.connect(str(file)) as made:
        made.execute("create table numbers as select n from range(10) as numbers(n)")
    context = gx.get_context(mode="ephemeral")
    source = context.data_sources.add_duckdb("mine", connection_string=f"duckdb:///{file}")
    batch = source.add_table_asset("numbers").add_batch_definition_whole_table("all").get_batch()
    assert batch.validate(gxe.ExpectColumnMaxToBeBetween(column="n", max_value=9)).success
