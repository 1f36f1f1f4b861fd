"""Table `batch_ledger`: the counts of each batch, region and event hour. The rows of a correction are differences."""

from __future__ import annotations

from great_expectations.expectations.expectation import Expectation

from expectations.suites.common import (
    BATCH_COLUMNS,
    baseline,
    column_types,
    known,
    no_result,
    no_rows,
    not_null,
    region_form,
    schema,
)
from expectations.suites.suite import Suite

_PLACE = ("stream", "region", "_batch_id", "_run_id")
_OUTCOMES = ("accepted", "duplicate", "conflict", "rejected")
_OFFERED = " + ".join(_OUTCOMES)
_PARTS = ("late", "invalid_traffic", "unpriced")
_COUNTS = ("offered", *_OUTCOMES, *_PARTS)
_CELL = "_query_id, _batch_id, stream, source, region"
_OUTCOME_SUMS = " union all ".join(f"select '{name}' as value, sum({name}) as weight from {{batch}}" for name in _OUTCOMES)
_SUMS = ", ".join(f"sum({name}) as {name}" for name in (*_COUNTS, "spend_nanos"))


def _cells(name: str, where: str, description: str) -> Expectation:
    """Expect no cell (batch, source and region of the hour, corrections included) ``where``."""
    cells = f"select {_CELL}, {_SUMS} from {{batch}} group by {_CELL}"
    return no_result(name, f"select {_CELL}, {', '.join(_COUNTS)} from ({cells}) as cells where {where}", description)


BATCH_LEDGER = Suite(
    table="batch_ledger",
    columns=column_types(f"""
        stream VARCHAR, source VARCHAR, region VARCHAR, event_hour TIMESTAMPTZ, {", ".join(f"{name} BIGINT" for name in _COUNTS)},
        spend_nanos DECIMAL(38,0), lost_offsets BIGINT, max_received_at TIMESTAMPTZ, ingested_at TIMESTAMPTZ, {BATCH_COLUMNS}
    """),
    in_hour="event_hour >= {start} and event_hour < {end}",
    place=_PLACE,
    expectations=(
        *schema(),
        *not_null("stream", "source", "region", *_COUNTS, "spend_nanos", "ingested_at", "_query_id", "_batch_id"),
        known("stream", ["events", "orders"], "stream is events or orders"),
        region_form(_PLACE),
        *no_rows(
            _PLACE,
            {
                "event_hour.whole": ("event_hour <> (select starts_at from this_hour)", "event_hour is a whole hour"),
                "offered.adds_up": (f"offered <> {_OFFERED}", f"offered = {_OFFERED}, in each row"),
            },
        ),
        *(_cells(f"{name}.not_negative", f"{name} < 0", f"{name} of a batch, corrected, is not negative") for name in _COUNTS),
        _cells("spend_nanos.not_negative", "spend_nanos < 0", "spend_nanos of a batch, corrected, is not negative"),
        *(_cells(f"{name}.part_of_accepted", f"{name} > accepted", f"{name} is a part of accepted") for name in _PARTS),
        no_result(
            "_batch_id.unique",
            f"select {_CELL}, _run_id, count(*) as rows from {{batch}} group by all having count(*) > 1",
            "a batch or a correction of it has one row a source and region",
        ),
        *baseline("batch_ledger", "select sum(offered) from {batch}", {"outcome": _OUTCOME_SUMS}),
    ),
)
