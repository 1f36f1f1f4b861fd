"""Expectations that several suites share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from great_expectations.expectations.expectation import Expectation

from expectations._gx import gxe
from expectations.custom import ExpectNoRows, ExpectSharesToBeStable, ExpectVolumeToBeUsual
from expectations.results import Severity
from expectations.suites.suite import check
from expectations.trailing import MAX_ROBUST_Z, MAX_STABILITY_INDEX

BATCH_COLUMNS = "_query_id VARCHAR, _batch_id BIGINT, _run_id VARCHAR"

_REGION, _CURRENCY = "[a-z0-9-]{1,32}", "[A-Z]{3}"


def column_types(columns: str) -> dict[str, str]:
    """Parse a list of columns with their DuckDB types; returns types as DuckDB describes them."""
    pairs = (column.split() for column in re.split(r",\s+", columns.strip()))
    return {name: kind.replace("TIMESTAMPTZ", "TIMESTAMP WITH TIME ZONE") for name, kind in pairs}


def no_row(place: tuple[str, ...], name: str, where: str, description: str) -> Expectation:
    """Expect no row ``where``. The data docs show ``place`` and the column of the check's name."""
    shown = dict.fromkeys((*place, name.partition(".")[0]))
    condition = where.replace("{", "{{").replace("}", "}}")  # braces in SQL are not Great Expectations' own
    query = f"select {', '.join(shown)} from {{batch}} where {condition}"
    return ExpectNoRows(unexpected_rows_query=query, **check(name, description))


def no_rows(place: tuple[str, ...], rules: Mapping[str, tuple[str, str]]) -> tuple[Expectation, ...]:
    """Expect no row that breaks one of the rules: name -> (where, description)."""
    return tuple(no_row(place, name, where, description) for name, (where, description) in rules.items())


def no_result(
    name: str, query: str, description: str, severity: Severity = Severity.ERROR, *, needs: str | None = None
) -> Expectation:
    """Expect a query over ``{batch}`` to return nothing."""
    return ExpectNoRows(unexpected_rows_query=query, **check(name, description, severity, needs=needs))


def region_form(place: tuple[str, ...]) -> Expectation:
    """Expect regions in the contract's form."""
    wrong = f"not regexp_full_match(region, '{_REGION}')"
    return no_row(place, "region.form", wrong, "region is 1 to 32 of a-z, 0-9 and -")


def currency_form(place: tuple[str, ...]) -> Expectation:
    """Expect currency codes."""
    return no_row(place, "currency.form", f"not regexp_full_match(currency, '{_CURRENCY}')", "currency is three capitals")


def not_null(*columns: str) -> tuple[Expectation, ...]:
    """Expect a value in each of the columns."""
    return tuple(
        gxe.ExpectColumnValuesToNotBeNull(column=column, **check(f"{column}.not_null", f"{column} is never null"))
        for column in columns
    )


def not_negative(*columns: str, of: str = "", **options: Any) -> tuple[Expectation, ...]:
    """Expect no negative value in the columns. ``of`` adds to the description; ``options`` are those of the expectation."""
    return tuple(
        gxe.ExpectColumnValuesToBeBetween(
            column=column, min_value=0, **options, **check(f"{column}.not_negative", f"{column}{of} is not negative")
        )
        for column in columns
    )


def known(column: str, values: list[str], description: str) -> Expectation:
    """Expect null or one of the values."""
    return gxe.ExpectColumnValuesToBeInSet(column=column, value_set=values, **check(f"{column}.known", description))


def unique(column: str) -> Expectation:
    """Expect each value of the column once in the hour."""
    return gxe.ExpectColumnValuesToBeUnique(column=column, **check(f"{column}.unique", f"{column} stands once in the hour"))


def id_length(column: str) -> Expectation:
    """Expect ids with a length that the contract allows."""
    return gxe.ExpectColumnValueLengthsToBeBetween(
        column=column, min_value=1, max_value=128, **check(f"{column}.length", f"{column} has 1 to 128 characters")
    )


def schema() -> tuple[Expectation, ...]:
    """Expect the declared columns with their types; warn about other columns."""
    # the SQL comment names {batch}, because Great Expectations warns about queries that do not read it
    differ = "select * from table_columns where found is distinct from declared and declared is {} null /* of {{batch}} */"
    return (
        no_result("table.columns", differ.format("not"), "every declared column is there, with its type"),
        no_result("table.other_columns", differ.format(""), "there is no column that is not declared", Severity.WARN),
    )


def baseline(table: str, volume: str, shares: dict[str, str]) -> tuple[Expectation, ...]:
    """Expect the hour to be like the trailing week: its shares, and its volume.

    ``volume``: a query of one number. ``shares``: name -> a query of (value, weight).
    """
    drift = tuple(
        ExpectSharesToBeStable(
            query=query,
            before={"$PARAMETER": name},
            **check(
                f"{name}.drift",
                f"the shares of {table} by {name} are those of the trailing week (population stability index): "
                f"at most {MAX_STABILITY_INDEX:g}",
                Severity.WARN,
            ),
        )
        for name, query in shares.items()
    )
    usual = ExpectVolumeToBeUsual(
        query=volume,
        before={"$PARAMETER": "volume"},
        **check(
            "table.volume",
            f"{table} of this hour are as many as in the same hour of the days before (robust z-score): at most {MAX_ROBUST_Z:g}",
            Severity.WARN,
        ),
    )
    return (*drift, usual)


def against_ledger(measure: str, ours: str, booked: str, what: str) -> Expectation:
    """Expect, per batch and region, a sum over the hour to equal that of the ledger.

    The ledger books a batch of a Kafka topic by its cluster, while its records may name other regions: it is compared as a whole.
    A batch that is not in the ledger is incomplete and left out, because the ledger is pinned first.
    """
    cells = f"""
        with of_clusters as (
            select _query_id, _batch_id, bool_or(source = 'kafka') as is_whole from batch_ledger group by all
        ), sums as (
            select _query_id, _batch_id, region, {ours} as held from {{batch}} group by all
        ), held as (
            select _query_id, _batch_id, if(is_whole, 'all', region) as region, sum(held) as held
            from sums join of_clusters using (_query_id, _batch_id) group by all
        ), booked as (
            select _query_id, _batch_id, if(is_whole, 'all', region) as region, sum({booked}) as booked
            from batch_ledger join of_clusters using (_query_id, _batch_id) where in_hour group by all
        )
        select _query_id, _batch_id, region, coalesce(held, 0) as held, coalesce(booked, 0) as booked
        from held full join booked using (_query_id, _batch_id, region)
        where coalesce(held, 0) <> coalesce(booked, 0)
    """
    name = f"{measure}.is_what_the_ledger_says"
    return no_result(name, cells, f"per batch and region, {what} in batch_ledger", needs="batch_ledger")


def without_ledger() -> Expectation:
    """Expect no incomplete batch: a closed hour has none, unless late records are being ingested."""
    missing = """
        select * from (select _query_id, _batch_id, count(*) as rows from {batch} group by all) as batches
        where (_query_id, _batch_id) not in (select (_query_id, _batch_id) from batch_ledger)
    """
    description = "every batch with rows stands in batch_ledger"
    return no_result("_batch_id.is_complete", missing, description, Severity.WARN, needs="batch_ledger")
