"""Our counts by campaign and half an hour, with what a third party may count otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any

import pyarrow as pa

from orchestration.compare.report import MEASURES
from orchestration.explain.view import BuildView
from spark_jobs.errors import AdtallyError
from spark_jobs.lake.duck import literal
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, REJECTED_EVENTS

LONGEST_SHIFT = timedelta(hours=14)

PARTS = ("net", "invalid", "late", "late_invalid", "duplicate", "duplicate_invalid")
"""What is counted: billable and invalid events, those of each that came late, and further records of each (duplicates)."""

Key = tuple[date, str]
_Halves = dict[tuple[str, datetime], Counter[str]]


@dataclass
class Counts:
    """Per campaign and half an hour (UTC): ``<part>_<measure>`` -> count. ``days`` are those on which we have a campaign."""

    halves: _Halves
    knows_duplicates: bool = True
    _by_offset: dict[int, dict[Key, Counter[str]]] = field(default_factory=dict)

    def days(self, offset_minutes: int = 0) -> Mapping[Key, Counter[str]]:
        """The counts by day and campaign, days being cut at this offset from UTC."""
        if offset_minutes not in self._by_offset:
            found: dict[Key, Counter[str]] = {}
            for (campaign, half), counts in self.halves.items():
                found.setdefault(((half + timedelta(minutes=offset_minutes)).date(), campaign), Counter()).update(counts)
            self._by_offset[offset_minutes] = found
        return self._by_offset[offset_minutes]


def read_counts(view: BuildView, campaigns: Iterable[str], first: date, last: date, *, with_duplicates: bool) -> Counts:
    """Our counts of these campaigns from a day before ``first`` to a day after ``last``, as the marts' build has them.

    Duplicates are counted in the landing files (no table holds them): only ``with_duplicates``, and where the files are there.
    """
    names = pa.table({"campaign_id": sorted(set(campaigns))})
    view.connection.register("compared", names)
    begin = datetime.combine(first, datetime.min.time()) - LONGEST_SHIFT
    end = datetime.combine(last + timedelta(days=1), datetime.min.time()) + LONGEST_SHIFT
    halves: _Halves = {}
    listed = ", ".join(literal(name) for name in names["campaign_id"].to_pylist())
    totals = ", ".join(
        f"sum({column})::bigint as {part}_{measure}"
        for measure in MEASURES
        for part, column in (("net", measure), ("invalid", f"invalid_{measure}"))
    )
    minutes = view.marts(
        f"""
        select campaign_id, time_bucket(interval '30 minutes', event_minute) as half, {totals}
        from fct_campaign_minute
        where campaign_id in ({listed}) and event_minute >= timestamp '{begin}' and event_minute < timestamp '{end}'
        group by all
        """
    )
    _add(halves, minutes)
    _add(halves, _late(view, begin, end))
    knows = with_duplicates and any(view.lake.settings.landing_path.glob("events/*/*"))
    if knows:
        _add(halves, _duplicates(view, begin, end))
    return Counts(halves, knows or not with_duplicates)


def _add(halves: _Halves, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        counts = halves.setdefault((row["campaign_id"], row["half"]), Counter())
        counts.update({name: value for name, value in row.items() if name not in ("campaign_id", "half")})


def _measures(part: str) -> str:
    """SQL that counts billable and invalid events of the measures; ``weight`` is how often each counts."""
    kinds = zip(MEASURES, ("impression", "click"), strict=True)
    return ", ".join(
        f"coalesce(sum(weight) filter (event_type = '{kind}' and invalid_traffic_rule is {'not ' if tail else ''}null), 0)::bigint "
        f"as {part}{tail}_{measure}"
        for measure, kind in kinds
        for tail in ("", "_invalid")
    )


def _accepted(view: BuildView) -> str:
    """SQL of the accepted events of completed batches, of the campaigns compared."""
    return f"""
        (select * from {view.scan(EVENTS)}
         semi join (select distinct _query_id, _batch_id from {view.scan(BATCH_LEDGER)}) using (_query_id, _batch_id)
         where campaign_id in (select campaign_id from compared) and event_date between ?::date and ?::date)
    """


_HALF = "time_bucket(interval '30 minutes', event_time::timestamp) as half"


def _late(view: BuildView, begin: datetime, end: datetime) -> list[dict[str, Any]]:
    late = f"(select *, 1 as weight from {_accepted(view)} where is_late)"
    return view.rows(f"select campaign_id, {_HALF}, {_measures('late')} from {late} group by all", [begin.date(), end.date()])


def _duplicates(view: BuildView, begin: datetime, end: datetime) -> list[dict[str, Any]]:
    """Further records of accepted events: lines with its id, less the accepted one and those that were rejected or a conflict."""
    landing = literal(str(view.lake.settings.landing_path / "events" / "*" / "[!._]*"))
    try:
        return view.rows(
            f"""
            with accepted as (
                select event_id, campaign_id, event_type, event_time, invalid_traffic_rule from {_accepted(view)}
            ), offered as (
                select json_extract_string(line, '$.event_id') as event_id, count(*) as lines
                from read_csv({landing}, columns = {{line: 'varchar'}}, delim = '', quote = '', escape = '', header = false,
                    auto_detect = false, strict_mode = false, ignore_errors = true, max_line_size = 1048576)
                where json_valid(line) group by all
            ), refused as (
                select record_id as event_id, count(*) as lines from {view.scan(REJECTED_EVENTS)}
                where record_id is not null group by all
            ), counted as (
                select accepted.*, greatest(offered.lines - 1 - coalesce(refused.lines, 0), 0) as weight
                from accepted join offered using (event_id) left join refused using (event_id)
            )
            select campaign_id, {_HALF}, {_measures("duplicate")} from counted where weight > 0 group by all
            """,
            [begin.date(), end.date()],
        )
    except AdtallyError as error:
        raise AdtallyError(f"the landing files cannot be read: {error}") from error
