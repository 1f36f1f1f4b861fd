"""Compares a third party's report with the marts, and finds what explains each difference.

These causes can be distinguished:

- Their days are cut at another offset from UTC. There is one offset for the whole report: the one that leaves least unexplained,
  if that is less than half of what UTC leaves.
- They count duplicates, or invalid traffic, or leave out late records. Each line gets the causes that leave least unexplained;
  one more cause must leave less than half. Of equal choices the one counts that explains most of the report.
- A campaign's day is missing there or here.

The causes of a figure sum to its difference; ``unexplained`` is the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import combinations
from pathlib import Path

from orchestration.compare.counts import Counts, read_counts
from orchestration.compare.report import MEASURES, Key, ReportLine, read_report
from orchestration.explain.view import open_build
from spark_jobs.config import Settings

OFFSETS = tuple(sorted(range(-12 * 60, 14 * 60 + 1, 30), key=lambda minutes: (abs(minutes), minutes)))
"""Whole and half hours from UTC-12 to UTC+14, in minutes, sorted by their distance from UTC."""

BEHAVIOURS = ("duplicates", "invalid", "late")

Behaviour = tuple[str, ...]
Ours = dict[Key, Counter[str]]
_NOTHING: Counter[str] = Counter()
_ALL: tuple[Behaviour, ...] = tuple(chosen for size in range(len(BEHAVIOURS) + 1) for chosen in combinations(BEHAVIOURS, size))


@dataclass(frozen=True)
class Cell:
    """One figure: ours and theirs. ``causes`` sum to ours - theirs. ``discrepancy`` is None if only ours is 0."""

    measure: str
    ours: int
    theirs: int
    discrepancy: float | None
    is_within: bool
    causes: dict[str, int]


@dataclass(frozen=True)
class Line:
    """A campaign's day; ``line`` is its number in the file, None if the file lacks it."""

    line: int | None
    date: date
    campaign: str
    cells: list[Cell]


@dataclass(frozen=True)
class Comparison:
    """A report beside the marts. ``campaigns_not_named``: how many of ours with traffic on its days it does not name."""

    build_id: str
    tolerance: float
    utc_offset_minutes: int
    knows_duplicates: bool
    lines: list[Line]
    campaigns_not_named: int

    @property
    def over(self) -> list[Line]:
        """Return the lines with a figure over the tolerance."""
        return [line for line in self.lines if not all(cell.is_within for cell in line.cells)]

    @property
    def utc_offset(self) -> str:
        """Return the offset as text, as UTC+05:30."""
        hours, minutes = divmod(abs(self.utc_offset_minutes), 60)
        return f"UTC{'-' if self.utc_offset_minutes < 0 else '+'}{hours:02d}:{minutes:02d}"

    @property
    def causes(self) -> dict[str, int]:
        """Return the differences by measure and cause over all lines, as impressions_late."""
        found: Counter[str] = Counter()
        for cell in (cell for line in self.lines for cell in line.cells):
            found.update({f"{cell.measure}_{cause}": count for cause, count in cell.causes.items()})
        return {name: count for name, count in found.items() if count}

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            **asdict(self),
            "utc_offset": self.utc_offset,
            "causes": self.causes,
            "lines_over": len(self.over),
            "is_within": not self.over,
        }


def compare_report(settings: Settings, path: Path, *, tolerance: float) -> Comparison:
    """Compare the report in ``path`` with the published marts.

    Raises UsageError if the report is wrong, AdtallyError if there are no marts.
    """
    report = read_report(path)
    first, last = min(line.date for line in report), max(line.date for line in report)
    named = {line.campaign for line in report}
    with open_build(settings, "fct_campaign_day") as view:
        rows = view.marts(
            "select event_date, campaign_id, sum(impressions)::bigint as impressions, sum(clicks)::bigint as clicks "
            f"from fct_campaign_day where event_date between date '{first}' and date '{last}' group by all"
        )
        ours: Ours = {(row["event_date"], row["campaign_id"]): Counter({name: row[name] for name in MEASURES}) for row in rows}
        is_less = any(getattr(line, name) > ours.get(line.key, _NOTHING)[name] for line in report for name in MEASURES)
        counts = read_counts(view, named, first, last, with_duplicates=is_less)
    offset = _best_offset(report, counts)
    lines = _reported_lines(report, ours, counts, offset, tolerance)
    for key in sorted(key for key in ours.keys() - {line.key for line in report} if key[1] in named):
        cells = [_cell(name, ours[key][name], 0, tolerance, {"missing_there": ours[key][name]}) for name in MEASURES]
        lines.append(Line(None, *key, cells))
    others = {campaign for _, campaign in ours} - named
    return Comparison(view.build.build_id, tolerance, offset, counts.knows_duplicates, lines, len(others))


def _reported_lines(report: list[ReportLine], ours: Ours, counts: Counts, offset: int, tolerance: float) -> list[Line]:
    def unexplained_by(behaviour: Behaviour) -> int:
        return sum(_unexplained(line, counts.day(line.key, offset), behaviour) for line in report)

    ranked = sorted(_ALL, key=lambda behaviour: (unexplained_by(behaviour), len(behaviour)))
    lines = []
    for line in report:
        day = counts.day(line.key, offset)
        behaviour = _behaviour(line, day, ranked)
        cells = []
        for name in MEASURES:
            our, their = ours.get(line.key, _NOTHING)[name], int(getattr(line, name))
            causes = {"time_zone": our - day[f"net_{name}"]} if offset else {}
            causes |= _effects(name, day, behaviour)
            causes["unexplained"] = our - their - sum(causes.values())
            causes = {cause: count for cause, count in causes.items() if count}
            if line.key not in ours and not day:
                causes = {"missing_here": -their}
            cells.append(_cell(name, our, their, tolerance, causes))
        lines.append(Line(line.line, *line.key, cells))
    return lines


def _best_offset(report: list[ReportLine], counts: Counts) -> int:
    """Return the offset from UTC in minutes that leaves least unexplained, or 0 if UTC leaves less than twice as much."""

    def unexplained_at(offset: int) -> int:
        days = [(line, counts.day(line.key, offset)) for line in report]
        return sum(_unexplained(line, day, _behaviour(line, day, _ALL)) for line, day in days)

    at_utc = unexplained_at(0)
    best = min(OFFSETS, key=unexplained_at) if at_utc else 0
    return best if unexplained_at(best) * 2 < at_utc else 0


def _behaviour(line: ReportLine, day: Counter[str], among: Sequence[Behaviour]) -> Behaviour:
    """Return how they seem to count. One more cause must leave less than half unexplained. Of equal choices the first counts."""
    chosen: Behaviour = ()
    for size in range(1, len(BEHAVIOURS) + 1):
        sized = [behaviour for behaviour in among if len(behaviour) == size]
        best = min(sized, key=lambda behaviour: _unexplained(line, day, behaviour))
        if _unexplained(line, day, best) * 2 < _unexplained(line, day, chosen):
            chosen = best
    return chosen


def _unexplained(line: ReportLine, day: Counter[str], behaviour: Behaviour) -> int:
    """Return how far their figures are from those that they would report with this behaviour."""
    expected = {name: day[f"net_{name}"] - sum(_effects(name, day, behaviour).values()) for name in MEASURES}
    return sum(abs(getattr(line, name) - count) for name, count in expected.items())


def _effects(measure: str, day: Counter[str], behaviour: Behaviour) -> dict[str, int]:
    """Return by how much each behaviour makes their figure less than ours."""
    tails = ("", "_invalid") if "invalid" in behaviour else ("",)
    duplicates, late = (sum(day[f"{part}{tail}_{measure}"] for tail in tails) for part in ("duplicate", "late"))
    sizes = {"duplicates": -duplicates, "invalid": -day[f"invalid_{measure}"], "late": late}
    return {name: sizes[name] for name in behaviour}


def _cell(measure: str, ours: int, theirs: int, tolerance: float, causes: dict[str, int]) -> Cell:
    discrepancy = (ours - theirs) / ours if ours else (0.0 if theirs == 0 else None)
    return Cell(measure, ours, theirs, discrepancy, discrepancy is not None and abs(discrepancy) <= tolerance, causes)
