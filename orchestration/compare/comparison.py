"""Compares a report with the marts, and finds what explains each difference.

What can be told apart: their days are cut at another offset from UTC (one for the whole report: that at which least is left
unexplained, if it is less than half of what is at UTC); they count duplicates, or invalid traffic, or leave out what came late
(for each line the causes that leave least unexplained, one more where that leaves less than half; of equals those that explain
most of the report); a campaign's day is missing there or here. The causes of a figure sum to its difference, with what
remains as ``unexplained``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

from orchestration.compare.counts import Counts, Key, read_counts
from orchestration.compare.report import MEASURES, ReportLine, read_report
from orchestration.explain.view import open_build
from spark_jobs.config import Settings

OFFSETS = tuple(sorted(range(-12 * 60, 14 * 60 + 1, 30), key=lambda minutes: (abs(minutes), minutes)))
"""Whole and half hours from UTC-12 to UTC+14, in minutes, the nearest to UTC first."""

BEHAVIOURS = ("duplicates", "invalid", "late")

Behaviour = tuple[str, ...]
_ALL: tuple[Behaviour, ...] = tuple(chosen for size in range(len(BEHAVIOURS) + 1) for chosen in combinations(BEHAVIOURS, size))


@dataclass(frozen=True)
class Cell:
    """A figure: ours and theirs. ``causes`` sum to ours - theirs; ``discrepancy`` is None where only ours is 0."""

    measure: str
    ours: int
    theirs: int
    discrepancy: float | None
    is_within: bool
    causes: dict[str, int]


@dataclass(frozen=True)
class Line:
    """A campaign's day; ``line`` is its number in the file, None where the file lacks it."""

    line: int | None
    date: date
    campaign: str
    cells: list[Cell]


@dataclass(frozen=True)
class Comparison:
    """A report beside the marts. ``campaigns_not_named``: ours that have traffic on its days and that it does not name."""

    build_id: str
    tolerance: float
    utc_offset_minutes: int
    knows_duplicates: bool
    lines: list[Line]
    campaigns_not_named: int

    @property
    def over(self) -> list[Line]:
        """Lines with a figure over the tolerance."""
        return [line for line in self.lines if not all(cell.is_within for cell in line.cells)]

    @property
    def utc_offset(self) -> str:
        """The offset as UTC+05:30."""
        hours, minutes = divmod(abs(self.utc_offset_minutes), 60)
        return f"UTC{'-' if self.utc_offset_minutes < 0 else '+'}{hours:02d}:{minutes:02d}"

    @property
    def causes(self) -> dict[str, int]:
        """Differences by measure and cause over all lines, as impressions_late."""
        found: dict[str, int] = {}
        for line in self.lines:
            for cell in line.cells:
                for cause, count in cell.causes.items():
                    found[f"{cell.measure}_{cause}"] = found.get(f"{cell.measure}_{cause}", 0) + count
        return {name: count for name, count in found.items() if count}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **asdict(self),
            "utc_offset": self.utc_offset,
            "causes": self.causes,
            "lines_over": len(self.over),
            "is_within": not self.over,
        }


def compare_report(settings: Settings, path: Path, *, tolerance: float) -> Comparison:
    """The report in ``path`` beside the published marts.

    Raises UsageError for a report that cannot be right, AdtallyError where there are no marts.
    """
    report = read_report(path)
    campaigns = sorted({line.campaign for line in report})
    first, last = min(line.date for line in report), max(line.date for line in report)
    with open_build(settings, "fct_campaign_day") as view:
        rows = view.marts(
            "select event_date, campaign_id, sum(impressions)::bigint as impressions, sum(clicks)::bigint as clicks "
            f"from fct_campaign_day where event_date between date '{first}' and date '{last}' group by all"
        )
        ours = {(row["event_date"], row["campaign_id"]): {name: row[name] for name in MEASURES} for row in rows}
        less = any(
            getattr(line, name) > ours.get((line.date, line.campaign), {}).get(name, 0) for line in report for name in MEASURES
        )
        counts = read_counts(view, campaigns, first, last, with_duplicates=less)
        named = set(campaigns)
        missing = sorted(key for key in ours if key[1] in named and key not in {(line.date, line.campaign) for line in report})
        return Comparison(
            view.build.build_id,
            tolerance,
            *_judge(report, missing, ours, counts, tolerance),
            campaigns_not_named=len({campaign for _, campaign in ours} - named),
        )


def _judge(
    report: list[ReportLine], missing: list[Key], ours: Mapping[Key, Mapping[str, int]], counts: Counts, tolerance: float
) -> tuple[int, bool, list[Line]]:
    offset = best_offset(report, counts)
    ranked = _ranked(report, counts, offset)
    lines = []
    for line in report:
        key = (line.date, line.campaign)
        mine = ours.get(key, dict.fromkeys(MEASURES, 0))
        chosen = _behaviour(line, counts, offset, ranked)
        cells = []
        for name in MEASURES:
            theirs = int(getattr(line, name))
            causes = {"missing_here": -theirs} if key not in ours and not counts.days(offset).get(key) else {}
            if not causes:
                causes = _causes(name, mine[name], theirs, counts, key, offset, chosen)
            cells.append(_cell(name, mine[name], theirs, tolerance, causes))
        lines.append(Line(line.line, line.date, line.campaign, cells))
    for key in missing:
        cells = [_cell(name, ours[key][name], 0, tolerance, {"missing_there": ours[key][name]}) for name in MEASURES]
        lines.append(Line(None, key[0], key[1], cells))
    return offset, counts.knows_duplicates, lines


def best_offset(report: Iterable[ReportLine], counts: Counts) -> int:
    """The offset from UTC in minutes at which least is left unexplained; 0 unless it is less than half of what is at 0."""
    lines = list(report)

    def left(offset: int) -> int:
        return sum(_rest(line, counts, offset, _behaviour(line, counts, offset, _ALL)) for line in lines)

    at_utc = left(0)
    best = min(OFFSETS, key=left) if at_utc else 0
    return best if left(best) * 2 < at_utc else 0


def _ranked(report: Iterable[ReportLine], counts: Counts, offset: int) -> list[Behaviour]:
    """Behaviours, those first that leave least of the whole report unexplained."""
    lines = list(report)
    return sorted(_ALL, key=lambda behaviour: (sum(_rest(line, counts, offset, behaviour) for line in lines), len(behaviour)))


def _behaviour(line: ReportLine, counts: Counts, offset: int, among: Sequence[Behaviour]) -> Behaviour:
    """How they seem to count: one more cause is taken if it leaves less than half unexplained; of equals the first."""
    chosen: Behaviour = ()
    for size in range(1, len(BEHAVIOURS) + 1):
        best = min(
            (behaviour for behaviour in among if len(behaviour) == size), key=lambda found: _rest(line, counts, offset, found)
        )
        if _rest(line, counts, offset, best) * 2 < _rest(line, counts, offset, chosen):
            chosen = best
    return chosen


def _rest(line: ReportLine, counts: Counts, offset: int, behaviour: Behaviour) -> int:
    """How far their figures lie from ours if they counted so."""
    key = (line.date, line.campaign)
    return sum(abs(getattr(line, name) - _expected(name, counts, key, offset, behaviour)) for name in MEASURES)


def _expected(measure: str, counts: Counts, key: Key, offset: int, behaviour: Behaviour) -> int:
    """What they would report if they counted so."""
    return _part(counts, key, offset, f"net_{measure}") - sum(_effects(measure, counts, key, offset, behaviour).values())


def _effects(measure: str, counts: Counts, key: Key, offset: int, behaviour: Behaviour) -> dict[str, int]:
    """By how much each behaviour makes theirs less than ours."""
    tails = ("", "_invalid") if "invalid" in behaviour else ("",)

    def of(part: str) -> int:
        return sum(_part(counts, key, offset, f"{part}{tail}_{measure}") for tail in tails)

    sizes = {"duplicates": -of("duplicate"), "invalid": -_part(counts, key, offset, f"invalid_{measure}"), "late": of("late")}
    return {name: sizes[name] for name in behaviour}


def _part(counts: Counts, key: Key, offset: int, name: str) -> int:
    found = counts.days(offset).get(key)
    return 0 if found is None else found[name]


def _causes(measure: str, ours: int, theirs: int, counts: Counts, key: Key, offset: int, behaviour: Behaviour) -> dict[str, int]:
    causes = {"time_zone": ours - _part(counts, key, offset, f"net_{measure}")} if offset else {}
    causes |= _effects(measure, counts, key, offset, behaviour)
    causes["unexplained"] = ours - theirs - sum(causes.values())
    return {name: count for name, count in causes.items() if count}


def _cell(measure: str, ours: int, theirs: int, tolerance: float, causes: dict[str, int]) -> Cell:
    discrepancy = (ours - theirs) / ours if ours else (0.0 if theirs == 0 else None)
    return Cell(measure, ours, theirs, discrepancy, discrepancy is not None and abs(discrepancy) <= tolerance, causes)
