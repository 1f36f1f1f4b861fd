"""Table `batch_ledger`: the counts of each batch, region and event hour. A correction's rows hold differences."""

from __future__ import annotations

from expectations.checks import Check, Kind, Suite, baseline, groups, not_null, rows, schema
from expectations.suites.common import BATCH_COLUMNS, BATCH_KEYS, MONEY, NUMBER, REGION, TEXT, TIME

_OUTCOMES = ("accepted", "duplicate", "conflict", "rejected")
_PARTS = ("late", "invalid_traffic", "unpriced")
_COUNTS = ("offered", *_OUTCOMES, *_PARTS)
_CELL = "_query_id, _batch_id, stream, source, region"
_SUMS = ", ".join(f"sum({name}) as {name}" for name in (*_COUNTS, "spend_nanos"))
_CELLS = f"select {_CELL}, {_SUMS} from grouped group by {_CELL}"
_REPEATED = f"select {_CELL}, _run_id, sum(rows)::bigint as rows from grouped group by all having sum(rows) > 1"


def _cells(name: str, column: str, offends: str, description: str) -> Check:
    """No cell (batch, source and region of the hour, corrections included) may satisfy ``offends``."""
    found = f"select {_CELL}, {', '.join(_COUNTS)} from ({_CELLS}) where {offends}"
    return Check(
        f"{column}.{name}",
        column,
        Kind.MEASURE,
        description,
        f"select count(*) from ({found})",
        offenders=f"{found} order by _batch_id, region",
    )


BATCH_LEDGER = Suite(
    table="batch_ledger",
    columns={
        "stream": TEXT,
        "source": TEXT,
        "region": TEXT,
        "event_hour": TIME,
        **dict.fromkeys(_COUNTS, NUMBER),
        "spend_nanos": MONEY,
        "lost_offsets": NUMBER,
        "max_received_at": TIME,
        "ingested_at": TIME,
        **BATCH_COLUMNS,
    },
    in_hour="event_hour >= {start} and event_hour < {end}",
    keys={**BATCH_KEYS, **{name: name for name in ("_run_id", "stream", "source", "region")}},
    sums={name: f"sum({name})" for name in (*_COUNTS, "spend_nanos")},
    shown=("stream", "region", "_batch_id", "_run_id"),
    checks=(
        *schema(),
        *not_null("stream", "source", "region", *_COUNTS, "spend_nanos", "ingested_at", "_query_id", "_batch_id"),
        groups("known", "stream", "stream not in ('events', 'orders')", "stream is events or orders"),
        groups("form", "region", REGION, "region is 1 to 32 of a-z, 0-9 and -"),
        rows("whole", "event_hour", "event_hour <> {start}", "event_hour is a whole hour"),
        rows(
            "adds_up",
            "offered",
            f"offered <> {' + '.join(_OUTCOMES)}",
            "offered = accepted + duplicate + conflict + rejected, in each row",
        ),
        *(_cells("not_negative", name, f"{name} < 0", f"{name} of a batch, corrected, is not negative") for name in _COUNTS),
        _cells("not_negative", "spend_nanos", "spend_nanos < 0", "spend_nanos of a batch, corrected, is not negative"),
        *(_cells("part_of_accepted", name, f"{name} > accepted", f"{name} is a part of accepted") for name in _PARTS),
        Check(
            "_batch_id.unique",
            "_batch_id",
            Kind.MEASURE,
            "a batch or a correction of it has one row a source and region",
            f"select count(*) from ({_REPEATED})",
            offenders=f"{_REPEATED} order by _batch_id, region",
        ),
        *baseline("batch_ledger", ("outcome",)),
    ),
    shares={"outcome": " union all ".join(f"select '{name}', sum({name}) from grouped" for name in _OUTCOMES)},
    volume="select coalesce(sum(offered), 0) from grouped",
)
