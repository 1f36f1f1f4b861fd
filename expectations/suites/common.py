"""What several suites say."""

from __future__ import annotations

from expectations.checks import Check, Kind, Severity

TEXT, NUMBER, TIME, DATE, FLAG = "VARCHAR", "BIGINT", "TIMESTAMP WITH TIME ZONE", "DATE", "BOOLEAN"
MONEY = "DECIMAL(38,0)"  # a sum of it, in a Delta table; the amount of one record is a NUMBER

BATCH_COLUMNS = {"_query_id": TEXT, "_batch_id": NUMBER, "_run_id": TEXT}
BATCH_KEYS = {"_query_id": "_query_id", "_batch_id": "_batch_id"}

REGION = "not regexp_full_match(region, '[a-z0-9-]{1,32}')"
CURRENCY = "not regexp_full_match(currency, '[A-Z]{3}')"
ID_LENGTH = "{0} = '' or (strlen({0}) > 128 and length({0}) > 128)"  # bytes are known, characters have to be counted


def against_ledger(measure: str, ours: str, booked: str, what: str) -> Check:
    """Per batch and region, a sum over the hour's groups is what the ledger says of the hour.

    A batch of a Kafka topic is booked by its cluster, while its records may name other regions: it is compared as a whole. A batch
    that is nowhere in the ledger is not complete yet, and left out: the versions are pinned with the ledger first.
    """
    cells = f"""
        with of_clusters as (
            select _query_id, _batch_id, bool_or(source = 'kafka') as is_whole from batch_ledger group by all
        ), held as (
            select _query_id, _batch_id, if(is_whole, 'all', region) as region, {ours} as held
            from grouped join of_clusters using (_query_id, _batch_id) group by all
        ), booked as (
            select _query_id, _batch_id, if(is_whole, 'all', region) as region, sum({booked}) as booked
            from batch_ledger join of_clusters using (_query_id, _batch_id) where in_hour group by all
        )
        select _query_id, _batch_id, region, coalesce(held, 0) as held, coalesce(booked, 0) as booked
        from held full join booked using (_query_id, _batch_id, region)
        where coalesce(held, 0) <> coalesce(booked, 0)
    """
    return Check(
        f"{measure}.is_what_the_ledger_says",
        measure,
        Kind.MEASURE,
        f"per batch and region, {what} in batch_ledger",
        f"select count(*) from ({cells})",
        offenders=f"{cells} order by _batch_id, region",
        needs="batch_ledger",
    )


def without_ledger() -> Check:
    """Rows of batches that are not complete (yet): none in an hour that is closed, unless late records are being ingested."""
    missing = """
        from grouped where (_query_id, _batch_id) not in (select (_query_id, _batch_id) from batch_ledger)
    """
    return Check(
        "_batch_id.is_complete",
        "_batch_id",
        Kind.MEASURE,
        "every batch with rows stands in batch_ledger",
        f"select coalesce(sum(rows), 0) {missing}",
        severity=Severity.WARN,
        offenders=f"select _query_id, _batch_id, sum(rows) as rows {missing} group by all order by _batch_id",
        needs="batch_ledger",
    )
