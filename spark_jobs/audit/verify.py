"""Verify what was billed: the hash chains, the arithmetic of the lines, a recount of the raw input, and a statement.

Nothing here is shared with the code that bills, and nothing is written but the store of parsed input. Needs no network.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from spark_jobs.audit.chain import CHAINED, Chain, ChainFault, Fault, NotedHead, read_chain
from spark_jobs.audit.database import open_database
from spark_jobs.audit.inputs import read_inputs
from spark_jobs.audit.recount_events import EventsRecount
from spark_jobs.audit.statement import compare_statement
from spark_jobs.config import Settings
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.retirements import recountable_from
from spark_jobs.lake.tables import BATCH_LEDGER, BILLING_LINES, MINUTE_METRICS
from spark_jobs.units import NO_HOUR, to_micros

Key = tuple[date, str, str, str]
"""Day, campaign, store and currency: what is billed as one."""

_RECORDS_AT_ONCE = 1_500_000
_EPOCH_DAY = date(1970, 1, 1)


@dataclass(frozen=True)
class VerifyFinding:
    """One thing that is wrong. ``check`` is chain, amounts, recount or statement; ``kind`` says how.

    ``row_id`` is the row's line_id, entry_id or closed hour. Amounts are micros: as found, and as they should be by the recount
    (None: unknown, or no amount).
    """

    check: str
    kind: str
    table: str
    position: int | None
    row_id: str | None
    detail: str
    currency: str | None = None
    amount_found: int | None = None
    amount_expected: int | None = None


@dataclass(frozen=True)
class VerifyReport:
    """What was verified. ``findings`` are in the order of the chain; ``heads`` are the ends of the chains.

    ``days`` were recounted. ``pending`` days have changed since the last posting, so that the next one settles them.
    Days that begin before ``recountable_from`` were not recounted, because raw input of them is retired (None: all input is there).
    """

    findings: list[VerifyFinding]
    heads: list[str]
    rows: dict[str, int]
    lines: int
    days: list[date] = field(default_factory=list)
    pending: list[date] = field(default_factory=list)
    statement_lines: int | None = None
    seconds: float = 0.0
    recountable_from: datetime | None = None


def verify(
    settings: Settings,
    *,
    now: datetime,
    statement: Path | None = None,
    expect: Sequence[str] = (),
    recounts: bool = True,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Check the chains, the amounts, the recount of the billed days (unless ``recounts`` is false) and a statement.

    ``expect`` are heads that were noted before (`NotedHead`): the chain must contain each. Raises UsageError for a head or a
    statement that cannot be read, TableCorruptionError for a table that cannot.
    """
    started, say = time.monotonic(), progress or (lambda _: None)
    wanted = [NotedHead.parse(text) for text in expect]
    lake = Lake(settings)
    say("checking the chains")
    chains = {table.name: read_chain(lake, table) for table in CHAINED}
    lines = chains[BILLING_LINES.name].rows
    faults = [fault for chain in chains.values() for fault in chain.faults]
    faults += [found for head in wanted for found in _unexpected(chains[head.table], head)]
    findings = [*map(_of_chain, faults), *_amounts(lines)]
    days, pending = _recountable(lake, lines) if recounts and lines else ([], [])
    since = recountable_from(settings)
    days = [day for day in days if since is None or day >= (since + timedelta(days=1, microseconds=-1)).date()]
    if days:
        spend = _recount(settings, days, now, say)
        findings = [_with_expected(found, lines, spend) for found in findings]
        findings += _differences(lines, spend, days)
    compared = None
    if statement is not None:
        compared, wrong = compare_statement(statement, lines)
        for one in wrong:
            at = None if one.row is None else one.row["chain_position"]
            findings.append(VerifyFinding("statement", "different", BILLING_LINES.name, at, one.line_id, one.detail))
    heads = [str(chain.head) for chain in chains.values() if chain.head is not None]
    rows = {name: len(chain.rows) for name, chain in chains.items()}
    return VerifyReport(findings, heads, rows, len(lines), days, pending, compared, time.monotonic() - started, since)


def _unexpected(chain: Chain, head: NotedHead) -> Iterator[ChainFault]:
    if not chain.contains(head):
        last = chain.head.position if chain.head else 0
        detail = f"the chain of {last} rows does not contain {head}"
        kind = Fault.REWRITTEN if last >= head.position else Fault.REMOVED
        row = next((row for row in chain.rows if row["chain_position"] == head.position), None)
        yield ChainFault(head.table, kind, head.position, detail, row)


def _of_chain(fault: ChainFault) -> VerifyFinding:
    row = fault.row or {}
    name = row.get("line_id") or row.get("entry_id") or row.get("closed_through")
    amount = row.get("amount_micros")
    found = VerifyFinding("chain", fault.fault.value, fault.table, fault.position, name and str(name), fault.detail)
    return found if amount is None else replace(found, currency=row["currency"], amount_found=int(amount))


# --- amounts


def _key(row: dict[str, Any]) -> Key:
    return row["event_date"], row["campaign_id"], row["store_id"], row["currency"]


def round_nanos(nanos: int) -> int:
    """Return whole micros, rounded half away from zero."""
    return int((Decimal(nanos) / 1000).quantize(Decimal(1), ROUND_HALF_UP))


def _amounts(lines: list[dict[str, Any]]) -> Iterator[VerifyFinding]:
    """Find the first line of each key whose amount is not the step from the sum before it to its own rounded spend."""
    billed: Counter[Key] = Counter()
    wrong: set[Key] = set()
    for row in lines:
        key, amount = _key(row), int(row["amount_micros"])
        expected = round_nanos(int(row["spend_nanos"])) - billed[key]
        billed[key] += amount
        if (amount != expected or int(row["billed_micros"]) != billed[key]) and key not in wrong:
            wrong.add(key)
            detail = f"{_named(key)}: the lines come to {billed[key]} micros, the line says {row['billed_micros']}"
            at, name = row["chain_position"], row["line_id"]
            yield VerifyFinding("amounts", "wrong_sum", BILLING_LINES.name, at, name, detail, row["currency"], amount, expected)


def _named(key: Key) -> str:
    return f"campaign {key[1]} of {key[2]} on {key[0]}"


# --- recount


def _recountable(lake: Lake, lines: list[dict[str, Any]]) -> tuple[list[date], list[date]]:
    """Return the billed days that have not changed since the last posting, and those that have."""
    billed = sorted({row["event_date"] for row in lines})
    place = next(
        (c.metadata["billing"]["place"] for c in lake.log(BILLING_LINES).commits_backwards() if "billing" in c.metadata), None
    )
    changed: set[date] = set()
    if place is not None:
        metrics = lake.log(MINUTE_METRICS).commits(place["metrics_version"], lake.version(MINUTE_METRICS) or 0) or []
        changes = [action for commit in metrics for action in (*commit.data_added, *commit.data_removed)]
        changed |= {date.fromisoformat(action["partitionValues"]["event_date"]) for action in changes}
        booked = lake.log(BATCH_LEDGER).commits(place["ledger_version"], lake.version(BATCH_LEDGER) or 0) or []
        rows = lake.read_files(BATCH_LEDGER, [path for commit in booked for path in commit.added_paths], "event_hour")
        changed |= {hour.date() for hour in rows["event_hour"].to_pylist() if hour is not None}
    return [day for day in billed if day not in changed], [day for day in billed if day in changed]


def _recount(settings: Settings, days: list[date], now: datetime, say: Callable[[str], None]) -> dict[Key, int]:
    """Return the spend of some days in nanos, by what the raw input says."""
    say("reading the raw input")
    inputs = read_inputs(settings, "events", missed_as="missed", now_us=to_micros(now))
    spend: dict[Key, int] = defaultdict(int)
    with open_database(inputs.snapshot) as database:
        recount = EventsRecount(database, inputs)
        wanted = {(day - _EPOCH_DAY).days for day in days}
        records = recount.records_by_hour()
        hours = sorted(hour for hour in recount.all_hours() if hour != NO_HOUR and hour // 24 in wanted)
        for group in _groups(hours, records):
            say(f"recounting {_EPOCH_DAY + timedelta(days=group[0] // 24)}")
            recount.count(group)
            for day, campaign, store, currency, nanos in database.rows(
                """
                select hour // 24, campaign_id, store_id, currency, sum(spend_nanos)::hugeint
                from outcomes join batches using (b) where outcome = 'accepted' and not is_left_out group by all
                """
            ):
                spend[_EPOCH_DAY + timedelta(days=int(day)), campaign, store, currency] += nanos
    return spend


def _groups(hours: list[int], records: dict[int, int]) -> Iterator[list[int]]:
    group: list[int] = []
    for hour in hours:
        if group and sum(records.get(one, 0) for one in (*group, hour)) > _RECORDS_AT_ONCE:
            yield group
            group = []
        group.append(hour)
    if group:
        yield group


def _billed(lines: list[dict[str, Any]]) -> Counter[Key]:
    billed: Counter[Key] = Counter()
    for row in lines:
        billed[_key(row)] += int(row["amount_micros"])
    return billed


def _differences(lines: list[dict[str, Any]], spend: dict[Key, int], days: list[date]) -> Iterator[VerifyFinding]:
    billed, chosen = _billed(lines), set(days)
    for key in sorted(key for key in billed.keys() | spend.keys() if key[0] in chosen):
        expected = round_nanos(spend.get(key, 0))
        if billed[key] != expected:
            last = next((row for row in reversed(lines) if _key(row) == key), None)
            at, name = (last["chain_position"], last["line_id"]) if last else (None, None)
            detail = f"{_named(key)} is billed {billed[key]} micros, the recount of the raw input comes to {expected}"
            yield VerifyFinding("recount", "different", BILLING_LINES.name, at, name, detail, key[3], billed[key], expected)


def _with_expected(found: VerifyFinding, lines: list[dict[str, Any]], spend: dict[Key, int]) -> VerifyFinding:
    """Add to a finding about a billing line the amount by which the lines of its key would come to the recount."""
    row = next((row for row in lines if row["line_id"] == found.row_id), None)
    if found.table != BILLING_LINES.name or row is None or _key(row) not in spend:
        return found
    others = _billed(lines)[_key(row)] - int(row["amount_micros"])
    return replace(found, amount_expected=round_nanos(spend[_key(row)]) - others)
