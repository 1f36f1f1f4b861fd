"""What compaction brings: a mart build and an hour's scan before and after it, and ways to compact against each other.

    python -m benchmarks.compaction                                     a day of 240,000 events, an hour of a million, in 60 batches
    python -m benchmarks.compaction --day-events 6000 --hour-events 6000 --batches 6 --rounds 1         does it work at all?

Both inputs go through the project's own ingestion, in small batches. Everything that is compared is measured in turn, round by
round; the figures are medians, of wall time and of CPU time (which other work on the machine disturbs less; the targets are held to
it). Every copy is held to the rows and the sums of the one that was not compacted.
Results go to benchmarks/results/compaction.json. Exit status 1: rows differ, or, with --check, a target was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
from deltalake import DeltaTable, WriterProperties
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from benchmarks.contestants import adtally_command
from benchmarks.measure import BenchmarkError, machine, note, run_measured
from orchestration.marts.build import build_marts
from services.simulator import simulate
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.duck import connect_delta
from spark_jobs.operate.compact import compact
from spark_jobs.operate.watermark import close_by_hand, read_closing

HERE = Path(__file__).parent
DAY = datetime(2025, 6, 2, tzinfo=UTC)
TARGET_BYTES = 128 * 1024 * 1024
Rewrite = Callable[[DeltaTable, list[tuple[str, str, Any]]], object]


def _z_order(*columns: str) -> Rewrite:
    properties = WriterProperties(compression="ZSTD", compression_level=1, max_row_group_size=65_536)
    return lambda held, hour: held.optimize.z_order(
        columns, partition_filters=hour, target_size=TARGET_BYTES, writer_properties=properties
    )


STRATEGIES: dict[str, Rewrite | None] = {
    "as ingested": None,
    "put together": lambda held, hour: held.optimize.compact(partition_filters=hour, target_size=TARGET_BYTES),
    "sorted by campaign": _z_order("campaign_id"),
    "Z-order campaign, time": _z_order("campaign_id", "event_time"),
    "Z-order campaign, user": _z_order("campaign_id", "user_id"),
}
CHOSEN = "Z-order campaign, user"
SCANS = {
    "whole hour": "select campaign_id, count(*), sum(spend_nanos) from {hour} group by all",
    "every column": "select bit_xor(hash(columns(*))) from {hour}",
    "one campaign": "select count(*), sum(spend_nanos) from {hour} and campaign_id = '{campaign}'",
    "one user": "select count(*), sum(spend_nanos), max(user_agent) from {hour} and user_id = '{user}'",
}


class Inputs:
    """Homes that were ingested in small batches; kept in the work folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work = Path(args.work).absolute() / "compaction"

    def home(self, name: str, events: int, days: float) -> Settings:
        """A home with so many events of so many days from DAY on, in ``--batches`` batches."""
        home = load_settings(home=self.work / f"{name}-{events}-{self.args.batches}-{self.args.seed}")
        done = home.home_path / "ingested"
        if done.exists():
            return home
        shutil.rmtree(home.home_path, ignore_errors=True)
        note(f"{name}: {events} events in {self.args.batches} batches")
        lines = -(-events // self.args.batches)
        options = {"campaigns": 1000, "ads": 10_000, "conversion": 0.0, "gz_share": 0.0, "lines_per_file": lines}
        simulate(home.landing_path, events, self.args.seed, start=DAY, days=days, **options)
        env = os.environ | {"ADTALLY_HOME": str(home.home_path), "ADTALLY_MAX_FILES_PER_BATCH": "1"}
        run_measured(adtally_command(), env, self.work / f"{name}.log", self.args.timeout)
        done.touch()
        return home

    def copy(self, of: Settings, name: str) -> Settings:
        """A home with the tables of another."""
        made = load_settings(home=self.work / "copies" / name)
        shutil.rmtree(made.home_path, ignore_errors=True)
        shutil.copytree(of.lakehouse_uri, made.lakehouse_uri)
        return made


def hour_of(home: Settings) -> dict[str, str]:
    """The hour with the most events, a campaign in the middle of its campaigns by size, and a user of some events."""
    uri = home.table_uri("events")
    with connect_delta() as lake:
        scan = f"delta_scan('{uri}')"
        day, hour = lake.execute(
            f"select event_date::varchar, event_hour from {scan} group by all order by count(*) desc, 1, 2 limit 1"
        ).fetchall()[0]
        where = f"event_date = '{day}' and event_hour = {hour}"
        ranked = "select {0} from {1} where {2} group by {0} order by count(*) desc, {0}"
        campaigns = lake.execute(ranked.format("campaign_id", scan, where)).fetchall()
        users = lake.execute(ranked.format("user_id", scan, where)).fetchall()
    return {"day": day, "number": str(hour), "where": where, "campaign": campaigns[len(campaigns) // 2][0], "user": users[0][0]}


@dataclass(frozen=True)
class Taken:
    """What one task took, its processes included, and its answer."""

    wall_seconds: float
    cpu_seconds: float
    answer: str = ""


class Watch:
    """Wall and CPU time since it was made."""

    def __init__(self) -> None:
        self._from = (time.perf_counter(), self._cpu())

    def taken(self, answer: str = "") -> Taken:
        return Taken(time.perf_counter() - self._from[0], self._cpu() - self._from[1], answer)

    @staticmethod
    def _cpu() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system


def scan_seconds(home: Settings, hour: dict[str, str]) -> dict[str, Taken]:
    """Each scan, in a connection of its own each."""
    found = {}
    for name, sql in SCANS.items():
        with connect_delta() as lake:
            lake.execute("set timezone = 'UTC'")
            source = f"delta_scan('{home.table_uri('events')}') where {hour['where']}"
            watch = Watch()
            rows = lake.execute(sql.format(hour=source, campaign=hour["campaign"], user=hour["user"])).fetchall()
            found[name] = watch.taken(repr(sorted(map(repr, rows))))
    return found


def file_figures(home: Settings, hour: dict[str, str]) -> dict[str, int]:
    """Files and bytes of the hour."""
    uri = home.table_uri("events")
    folder = f"event_date={hour['day']}/event_hour={hour['number']}/"
    paths = [path for path in DeltaTable(uri).file_uris() if folder in path]
    return {"files": len(paths), "bytes": sum(Path(path).stat().st_size for path in paths)}


def in_turn(rounds: int, measures: Mapping[str, Callable[[], dict[str, Taken]]]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Medians over the rounds of what each contestant takes for each task, and the answers that are not like the first's."""
    taken: dict[str, dict[str, list[Taken]]] = {name: {} for name in measures}
    answers: dict[str, str] = {}
    wrong: set[str] = set()
    names = list(measures)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            for task, one in measures[name]().items():
                taken[name].setdefault(task, []).append(one)
                if answers.setdefault(task, one.answer) != one.answer:
                    wrong.add(f"{name}: another answer to {task}")
    return {name: {task: medians(all_) for task, all_ in tasks.items()} for name, tasks in taken.items()}, sorted(wrong)


def medians(all_: list[Taken]) -> dict[str, float]:
    """Of several runs of one task."""
    return {
        "wall_seconds": round(statistics.median(one.wall_seconds for one in all_), 4),
        "cpu_seconds": round(statistics.median(one.cpu_seconds for one in all_), 4),
    }


def strategies(inputs: Inputs) -> tuple[dict[str, Any], list[str]]:
    """Ways to compact one hour, and what its scans cost then."""
    args = inputs.args
    home = inputs.home("hour", args.hour_events, 1 / 24)
    hour = hour_of(home)
    partition = [("event_date", "=", hour["day"]), ("event_hour", "=", hour["number"])]
    figures: dict[str, dict[str, Any]] = {}
    homes = {}
    for name, rewrite in STRATEGIES.items():
        homes[name] = inputs.copy(home, name.replace(" ", "_"))
        watch = Watch()
        if rewrite is not None:
            rewrite(DeltaTable(homes[name].table_uri("events")), partition)
        figures[name] = {"rewrite": medians([watch.taken()]), **file_figures(homes[name], hour)}
        note(f"{name}: {figures[name]}")
    measures = {name: partial(scan_seconds, held, hour) for name, held in homes.items()}
    scans, wrong = in_turn(args.rounds, measures)
    return {name: figures[name] | {"scans": scans[name]} for name in STRATEGIES}, wrong


def before_and_after(inputs: Inputs) -> tuple[dict[str, Any], list[str]]:
    """A day as it was ingested, and the same day after `adtally compact`."""
    args = inputs.args
    home = inputs.home("day", args.day_events, 1.0)
    hour = hour_of(home)
    homes = {"before": inputs.copy(home, "before"), "after": inputs.copy(home, "after")}
    closing = read_closing(homes["after"])
    through = datetime(2025, 6, 4, tzinfo=UTC)
    if closing.closed_through is None or closing.closed_through < through:
        close_by_hand(homes["after"], through, reason="benchmark", closed_by="benchmark")
    watch = Watch()
    report = compact(homes["after"], None)
    sums: dict[str, Any] = {
        "tables": len({part.table for part in report.tables}),
        "partitions": len(report.tables),
        "files_before": sum(part.files_before for part in report.tables),
        "files_after": sum(part.files_after for part in report.tables),
        "events": sum(part.rows for part in report.tables if part.table == "events"),
        **medians([watch.taken()]),
    }
    note(f"compaction: {sums}")
    measures = {name: partial(scan_seconds, held, hour) for name, held in homes.items()}
    scans, wrong = in_turn(args.rounds, measures)
    builds, wrong_builds = in_turn(args.mart_rounds, {name: partial(mart_seconds, held) for name, held in homes.items()})
    return {
        "compaction": sums,
        "scans": scans,
        "mart_build": {name: tasks["mart build"] for name, tasks in builds.items()},
        "hour": {name: file_figures(held, hour) for name, held in homes.items()},
    }, wrong + wrong_builds


def mart_seconds(home: Settings) -> dict[str, Taken]:
    """A build of all the marts, and the sums of what it published."""
    watch = Watch()
    build_marts(home)
    taken = watch.taken()
    with duckdb.connect(str(home.marts_path), read_only=True) as marts:
        sums = marts.execute("select count(*), sum(impressions), sum(clicks), sum(spend_micros) from fct_campaign_day").fetchall()
    return {"mart build": replace(taken, answer=repr(sums))}


def show(document: dict[str, Any], console: Console) -> None:
    """The figures as tables: CPU time, and wall time behind it."""

    def both(one: dict[str, float], scale: float, digits: int) -> str:
        return f"{scale * one['cpu_seconds']:.{digits}f} / {scale * one['wall_seconds']:.{digits}f}"

    table = Table("CPU / wall", "rewrite s", "files", "MiB", *(f"{name}, ms" for name in SCANS), title="an hour")
    for name, figures in document["summary"]["strategies"].items():
        scans = [both(figures["scans"][scan], 1000, 0) for scan in SCANS]
        table.add_row(name, both(figures["rewrite"], 1, 1), str(figures["files"]), f"{figures['bytes'] / 2**20:.1f}", *scans)
    console.print(table)
    day = document["summary"]["day"]
    table = Table("CPU / wall", "hour's files", *(f"{name}, ms" for name in SCANS), "mart build, s", title="a day")
    for name, of_day in day["scans"].items():
        scans = [both(of_day[scan], 1000, 0) for scan in SCANS]
        table.add_row(name, str(day["hour"][name]["files"]), *scans, both(day["mart_build"][name], 1, 1))
    console.print(table)
    console.print(f"compaction of the day: {day['compaction']}")


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="benchmarks.compaction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--day-events", type=int, default=240_000)
    made.add_argument("--hour-events", type=int, default=1_000_000)
    made.add_argument("--batches", type=int, default=60, help="landing files, and batches, of each input")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--mart-rounds", type=int, default=3)
    made.add_argument("--seed", type=int, default=7)
    made.add_argument("--timeout", type=float, default=3600.0, help="seconds after which an ingest is given up")
    made.add_argument("--name", default="compaction", help="name of the result")
    made.add_argument("--work", default=str(HERE / ".work"), help="inputs and copies; may be deleted")
    made.add_argument("--results", default=str(HERE / "results"))
    made.add_argument("--check", action="store_true", help="exit status 1 if a target is missed")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run it and write the result."""
    args = parser().parse_args(argv)
    inputs = Inputs(args)
    inputs.work.mkdir(parents=True, exist_ok=True)
    host = machine()
    try:
        with FileLock(inputs.work / "lock", timeout=0):
            ways, wrong = strategies(inputs)
            day, wrong_of_day = before_and_after(inputs)
    except Timeout:
        print(f"benchmark: another one is running in {inputs.work}", file=sys.stderr)
        return 1
    except BenchmarkError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(inputs.work / "copies", ignore_errors=True)
    ratio = ways[CHOSEN]["scans"]["whole hour"]["cpu_seconds"] / ways["as ingested"]["scans"]["whole hour"]["cpu_seconds"]
    build = day["mart_build"]["after"]["cpu_seconds"] / day["mart_build"]["before"]["cpu_seconds"]
    targets = [
        {"name": "an hour's scan, after / before, CPU", "value": ratio, "limit": 1.0, "strict": True, "met": ratio < 1.0},
        {"name": "mart build, after / before, CPU", "value": build, "limit": 1.05, "strict": False, "met": build <= 1.05},
    ]
    document: dict[str, Any] = {
        "scenario": "compaction",
        "machine": host | {"load_average_at_end": round(os.getloadavg()[0], 2)},
        "parameters": {k: v for k, v in vars(args).items() if k not in ("work", "results", "name")},
        "summary": {"strategies": ways, "day": day},
        "targets": targets,
        "runs": [{"wrong": wrong + wrong_of_day}],
    }
    path = Path(args.results) / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    show(document, Console())
    for problem in document["runs"][0]["wrong"]:
        print(f"wrong rows: {problem}", file=sys.stderr)
    return 1 if document["runs"][0]["wrong"] or (args.check and not all(t["met"] for t in targets)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
