"""Reads our counts by campaign and half an hour, with the records that a third party may count differently."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta

import pyarrow as pa

from orchestration.compare.report import MEASURES, Key
from orchestration.explain.view import BuildView, Row
from spark_jobs.errors import AdtallyError
from spark_jobs.lake.duck import literal
from spark_jobs.lake.landing_view import refresh_landing
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, REJECTED_EVENTS

LONGEST_SHIFT = timedelta(hours=14)


@dataclass
class Counts:
    """Counts by campaign and half an hour (UTC): ``<part>_<measure>`` -> count.

    The parts are net and invalid, late and late_invalid, duplicate and duplicate_invalid (further records of an event).
    """

    halves: dict[tuple[str, datetime], Counter[str]] = field(default_factory=dict)
    knows_duplicates: bool = True
    _by_offset: dict[int, dict[Key, Counter[str]]] = field(default_factory=dict)

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows, which have campaign_id, half and counts."""
        for row in rows:
            counts = {name: value for name, value in row.items() if name not in ("campaign_id", "half")}
            self.halves.setdefault((row["campaign_id"], row["half"]), Counter()).update(counts)

    def day(self, key: Key, offset_minutes: int) -> Counter[str]:
        """Return the counts of a day and campaign, with days cut at this offset from UTC; empty without traffic."""
        if offset_minutes not in self._by_offset:
            found = self._by_offset[offset_minutes] = defaultdict(Counter)
            for (campaign, half), counts in self.halves.items():
                found[(half + timedelta(minutes=offset_minutes)).date(), campaign].update(counts)
        return self._by_offset[offset_minutes].get(key, Counter())


def read_counts(view: BuildView, campaigns: Iterable[str], first: date, last: date, *, with_duplicates: bool) -> Counts:
    """Read the counts of these campaigns in the marts' build, from a day before ``first`` to a day after ``last``.

    No table has duplicates: they are counted in the landing files, if ``with_duplicates`` and if the files still exist.
    """
    names = sorted(campaigns)
    view.connection.register("compared", pa.table({"campaign_id": names}))
    begin = datetime.combine(first, datetime.min.time()) - LONGEST_SHIFT
    end = datetime.combine(last + timedelta(days=1), datetime.min.time()) + LONGEST_SHIFT
    listed = ", ".join(map(literal, names))
    totals = ", ".join(
        f"sum({column})::bigint as {part}_{measure}"
        for measure in MEASURES
        for part, column in (("net", measure), ("invalid", f"invalid_{measure}"))
    )
    refresh_landing(view.lake.settings)
    is_counted = with_duplicates and any(view.lake.settings.landing_path.glob("events/*/*"))
    counts = Counts(knows_duplicates=is_counted or not with_duplicates)
    counts.add(
        view.marts(
            f"""
            select campaign_id, time_bucket(interval '30 minutes', event_minute) as half, {totals}
            from fct_campaign_minute
            where campaign_id in ({listed}) and event_minute >= timestamp '{begin}' and event_minute < timestamp '{end}'
            group by all
            """
        )
    )
    counts.add(_late(view, begin, end))
    if is_counted:
        counts.add(_duplicates(view, begin, end))
    return counts


def _measures(part: str) -> str:
    """Return SQL that counts billable and invalid events by measure. Column ``weight`` says how often an event counts."""
    kinds = zip(MEASURES, ("impression", "click"), strict=True)
    return ", ".join(
        f"coalesce(sum(weight) filter (event_type = '{kind}' and invalid_traffic_rule is {'not ' if tail else ''}null), 0)::bigint "
        f"as {part}{tail}_{measure}"
        for measure, kind in kinds
        for tail in ("", "_invalid")
    )


def _accepted(view: BuildView) -> str:
    """Return SQL of the accepted events of completed batches, of the compared campaigns."""
    return f"""
        (select * from {view.scan(EVENTS)}
         semi join (select distinct _query_id, _batch_id from {view.scan(BATCH_LEDGER)}) using (_query_id, _batch_id)
         where campaign_id in (select campaign_id from compared) and event_date between ?::date and ?::date)
    """


_HALF = "time_bucket(interval '30 minutes', event_time::timestamp) as half"


def _late(view: BuildView, begin: datetime, end: datetime) -> list[Row]:
    late = f"(select *, 1 as weight from {_accepted(view)} where is_late)"
    return view.rows(f"select campaign_id, {_HALF}, {_measures('late')} from {late} group by all", [begin.date(), end.date()])


def _duplicates(view: BuildView, begin: datetime, end: datetime) -> list[Row]:
    """Count further records of accepted events: lines with the id, less the accepted one, the rejected ones and the conflicts."""
    landing = literal(f"{view.lake.settings.landing_uri}/events/*/[!._]*")
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
