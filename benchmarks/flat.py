"""What each capability costs after 90 days of history, beside two: the same volume a day, the same new input.

    python -m benchmarks.run flat --days 90 --json                                       the benchmark
    python -m benchmarks.run flat --days 3 --short-days 1 --rounds 1 --batches-a-day 2   does it work at all?

Two homes have the same last days; one has ``--days``, the other ``--short-days``. The ingest's own jobs made them (without Spark).
Every ten days were reviewed, credited and billed; in the end all was recounted, and small files were merged. A round adds a day's
first hour to both homes, which closes the day before, and then runs every capability on both, in turns. Each run is a fresh process
that has imported everything and read nothing, so the start of Python dilutes no figure. The figures are medians over the rounds;
the ratio is that of CPU time.

Results go to benchmarks/results/flat-<days>.json. Exit status 1: a capability failed or, with --check, a ratio is over the limit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import resource
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from deltalake import DeltaTable
from rich.console import Console
from rich.table import Table

from benchmarks.measure import BenchmarkError, machine, note, only_one, write_result
from spark_jobs.config import Settings, load_settings
from spark_jobs.ingest.stream import StreamJob
from spark_jobs.lake.tables import TABLES
from spark_jobs.units import HOUR, HourRange

FORMAT = 1  # part of the cache key: raise it when the homes change
LIMIT = 1.2
LEAST = 0.01  # seconds: a shorter run counts as this, because Dagster's own part of a tick is 0.15
END = datetime(2026, 6, 1, tzinfo=UTC)  # of the history
DAY = timedelta(days=1)
CAMPAIGNS, STORES, ADS, USERS_A_DAY = 200, 100, 1_000, 1_500


@dataclass(frozen=True)
class HistorySpec:
    """What a history depends on."""

    days: int
    events_a_day: int = 24_000
    batches_a_day: int = 4
    format: int = FORMAT

    @property
    def slot(self) -> timedelta:
        """The time whose events are a batch."""
        return DAY / self.batches_a_day


# --- the input


def land(settings: Settings, start: datetime, span: timedelta, events: int) -> dict[str, Path]:
    """Write a file of events and one of orders of a span of time; the same bytes for the same arguments."""
    import duckdb

    paths = {}
    first_us, day = int(start.timestamp() * 1_000_000), f"{start:%Y%m%d}"
    span_us = int(span.total_seconds() * 900_000)  # clicks and orders follow within the span
    users = f"hash(origin, {first_us}) % {USERS_A_DAY}"
    text = "strftime(make_timestamp(({})::bigint), '%Y-%m-%dT%H:%M:%S.%fZ')"
    shown = f"""
        select n, n - (n % 10 = 9)::int as origin, {users} as user_number, n % 10 = 9 as is_click,
            {first_us} + (hash(origin, 1) % {span_us}) + is_click::int * 20000000 as time_us,
            hash(origin, 2) % {ADS} as ad
        from (select unnest(range({events})) as n)
    """
    selects = {
        "events": f"""
            select 'e-{first_us}-' || n as event_id, if(is_click, 'click', 'impression') as event_type,
                {text.format("time_us")} as event_time, {text.format("time_us + 2000000")} as received_at,
                'c-' || (ad % {CAMPAIGNS}) as campaign_id, 'a-' || ad as ad_id, 's-' || (user_number % {STORES}) as store_id,
                'u-{day}-' || user_number as user_id, if(is_click, 'e-{first_us}-' || origin, null) as impression_id,
                'feed' as placement, 1000 + hash(n, 3) % 100000 as price_micros, 'EUR' as currency,
                'ShopApp/7.3 (iOS 18.1)' as user_agent
            from ({shown}) order by time_us
        """,
        "orders": f"""
            select 'o-{first_us}-' || n as order_id, {text.format("time_us + 60000000")} as order_time,
                {text.format("time_us + 62000000")} as received_at, 'u-{day}-' || user_number as user_id,
                's-' || (user_number % {STORES}) as store_id, 1000000 + hash(n, 4) % 90000000 as total_micros,
                'EUR' as currency, 'placed' as status
            from ({shown}) where is_click order by time_us
        """,
    }
    for stream, select in selects.items():
        path = settings.landing_path / stream / "eu" / f"{start:%Y%m%dT%H%M%S}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with duckdb.connect(config={"threads": 1}) as database:
            database.execute(f"copy ({select}) to '{path}.tmp' (format json)")
        moment = int((start + span).timestamp())
        os.utime(f"{path}.tmp", (moment, moment))
        os.replace(f"{path}.tmp", path)
        paths[stream] = path
    return paths


def land_campaigns(settings: Settings) -> None:
    """Write the campaigns of all events."""
    lines = ["campaign_id,store_id,billing_model,daily_budget_micros,currency,valid_from,valid_to"]
    lines += [f"c-{n},s-{n % STORES},{'cpc' if n % 3 else 'cpm'},90000000,EUR,2020-01-01T00:00:00Z," for n in range(CAMPAIGNS)]
    path = settings.landing_path / "campaigns" / "campaigns.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


class Ingest:
    """The ingest of a home without Spark: each batch has the files that it is given."""

    def __init__(self, settings: Settings) -> None:
        from benchmarks.in_process import Checkpoint, LocalExecutor
        from spark_jobs.ingest.events import EventsJob
        from spark_jobs.ingest.orders import OrdersJob

        self._executor = LocalExecutor()
        self.checkpoints = {stream: Checkpoint(settings, stream) for stream in ("events", "orders")}
        self._jobs: dict[str, StreamJob[Any]] = {
            "events": EventsJob(settings, lambda _: None),
            "orders": OrdersJob(settings, lambda _: None),
        }

    def batch(self, stream: str, paths: list[Path], planned: datetime) -> None:
        """Run a batch of some files."""
        checkpoint = self.checkpoints[stream]
        number = checkpoint.plan(paths, int(planned.timestamp() * 1000))
        self._jobs[stream].run_batch(number, self._executor)
        checkpoint.end(number)


# --- the histories


def make_history(settings: Settings, spec: HistorySpec) -> None:
    """Make a home with so many days before END, as the hourly job leaves them."""
    from spark_jobs.corrections.reconcile import reconcile
    from spark_jobs.lake.writes import ensure_tables
    from spark_jobs.operate.compact import compact
    from spark_jobs.operate.settle import settle

    land_campaigns(settings)
    ensure_tables(settings)
    ingest = Ingest(settings)
    for day in range(spec.days):
        start = END - (spec.days - day) * DAY
        orders = []
        for number in range(spec.batches_a_day):
            landed = land(settings, start + number * spec.slot, spec.slot, spec.events_a_day // spec.batches_a_day)
            orders.append(landed["orders"])
            ingest.batch("events", [landed["events"]], start + (number + 1) * spec.slot)
        ingest.batch("orders", orders, start + DAY)
        if day % 10 == 9 or day == spec.days - 1:
            settle(settings, now=start + DAY)
            for checkpoint in ingest.checkpoints.values():
                checkpoint.compact()
        if day % 10 == 9:
            note(f"    {day + 1} of {spec.days} days")
    reconcile(settings, None, now=END)
    compact(settings, HourRange(END - DAY, END - DAY + HOUR), now=END)  # not each hour: events have one file or two in each


def age_commits(settings: Settings, days: int) -> None:
    """Spread the commits over the days, and delete what knows them by their hash, which is derived and made again."""
    until_ms = int((time.time() - 7200) * 1000)  # signals look at the last hour
    for table in TABLES:
        commits = sorted((Path(settings.lakehouse_uri) / table / "_delta_log").glob("*.json"))
        for number, path in enumerate(commits, 1):
            at_ms = until_ms - int((1 - number / len(commits)) * days * 86_400_000)
            lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            for action in lines:
                if "commitInfo" in action:
                    action["commitInfo"]["timestamp"] = at_ms
                if "remove" in action:
                    action["remove"]["deletionTimestamp"] = at_ms
            path.write_text("".join(json.dumps(action, separators=(",", ":")) + "\n" for action in lines), "utf-8")
            os.utime(path, (at_ms / 1000, at_ms / 1000))
    for name in ("attribution_index", "key_index"):
        shutil.rmtree(settings.home_path / name, ignore_errors=True)
    for path in settings.recount_path.glob("plans*.json"):
        path.unlink()


def clean_logs(settings: Settings) -> None:
    """Do what delta-rs does at every hundredth commit: a checkpoint, and commits before it that are older than 30 days deleted."""
    for table in TABLES:
        held = DeltaTable(f"{settings.lakehouse_uri}/{table}")
        held.create_checkpoint()
        held.cleanup_metadata()


def copy_home(source: Path, target: Path) -> None:
    """Copy a home. Files that nothing changes are linked."""

    def copy(file: str, to: str) -> None:
        (os.link if file.endswith((".parquet", ".jsonl")) else shutil.copy2)(file, to)

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=copy, symlinks=True)


# --- what is measured


@dataclass(frozen=True)
class Moment:
    """A round: what the new hour is, and the newest one that it closed."""

    new: datetime
    closed: HourRange

    @classmethod
    def of(cls, number: int) -> Moment:
        new = END + number * DAY
        return cls(new, HourRange(new - DAY, new - DAY + HOUR))


Capability = Callable[[Settings, Moment, Any], Any]
"""Takes the home, the round and the state that its run in the round before returned; returns its new state."""


def _review(settings: Settings, moment: Moment, state: Any) -> Any:
    from spark_jobs.traffic.review import review

    report = review(settings, HourRange(moment.new, moment.new + HOUR), now=moment.new + HOUR)
    assert len(report.hours) == 1


def _review_all(settings: Settings, moment: Moment, state: Any) -> Any:
    from spark_jobs.traffic.review import review

    review(settings, now=moment.new + HOUR)


def _attribute(settings: Settings, moment: Moment, state: Any) -> Any:
    from spark_jobs.attribution.job import attribute

    assert attribute(settings, now=moment.new + HOUR).orders


def _bill(settings: Settings, moment: Moment, state: Any) -> Any:
    from spark_jobs.billing.job import bill

    assert bill(settings, now=moment.new + HOUR).lines


def _recount(settings: Settings, moment: Moment, state: Any) -> Any:
    from spark_jobs.corrections.reconcile import reconcile

    report = reconcile(settings, moment.closed, now=moment.new + HOUR)
    assert len(report.hours) == 1 and not report.differences


def _compact(settings: Settings, moment: Moment, state: Any) -> Any:
    from spark_jobs.operate.compact import compact

    compact(settings, moment.closed, now=moment.new + HOUR)


def _status(settings: Settings, moment: Moment, state: Any) -> Any:
    from spark_jobs.operate.status import read_status

    assert read_status(settings).conservation_holds


def _signal(name: str) -> Capability:
    def measure(settings: Settings, moment: Moment, state: Any) -> Any:
        from spark_jobs.operate.health import read_signal

        read_signal(settings, name)

    return measure


def _closing(settings: Settings, moment: Moment, state: Any) -> Any:
    from spark_jobs.operate.watermark import read_closing

    assert read_closing(settings).closed_through is not None


def _partitions(settings: Settings, moment: Moment, state: Any) -> Any:
    from orchestration.partitions import hourly_partitions

    hourly_partitions(settings, now=moment.new + HOUR)


def _closed_hours(settings: Settings, moment: Moment, state: Any) -> Any:
    """The sensor `closed_hours`; at first until it has asked for all hours."""
    import dagster as dg

    from orchestration.sensors import closed_hours as sensor

    def job_of_nothing() -> None:
        return

    hours = dg.HourlyPartitionsDefinition(start_date=END - 400 * DAY, timezone="UTC", fmt="%Y-%m-%d-%H:%M", end_offset=1)
    job = dg.define_asset_job("nothing")
    found = sensor.closed_hours_sensor(hours, job)
    while True:
        result = found(dg.build_sensor_context(cursor=state))
        assert isinstance(result, dg.SensorResult)
        asked, state = result.run_requests, result.cursor
        if moment.new > END or not asked:
            return state


def _stream_progress(settings: Settings, moment: Moment, state: Any) -> Any:
    """The sensor `stream_progress`; at first until it has reported all hours."""
    import dagster as dg

    from orchestration.sensors.stream_progress import Progress, report_progress

    hours = dg.HourlyPartitionsDefinition(start_date=END - 400 * DAY, timezone="UTC", fmt="%Y-%m-%d-%H:%M", end_offset=1)
    progress = Progress.from_cursor(state)
    while True:
        progress, events, _ = report_progress(settings, hours, progress, now=moment.new + HOUR)
        if moment.new > END or not events:
            return progress.to_cursor()


def _pacing(settings: Settings, moment: Moment, state: Any) -> Any:
    from orchestration.marts.pacing import early_spends

    early_spends(settings)


def capabilities() -> dict[str, Capability]:
    """All that is measured, in the order of a round."""
    from spark_jobs.operate.health import SIGNALS

    return {
        "review of an hour": _review,
        "review, nothing outdated": _review_all,
        "attribution": _attribute,
        "billing, a day closes": _bill,
        "recount of an hour": _recount,
        "compaction of an hour": _compact,
        "status": _status,
        "closed hours (hours)": _closing,
        "partitions of the code location": _partitions,
        "sensor closed_hours": _closed_hours,
        "sensor stream_progress": _stream_progress,
        "sensor alert_budget_pacing": _pacing,
        **{f"sensor alert_{name}": _signal(name) for name in SIGNALS},
    }


# --- how it is measured


def import_all() -> None:
    """Import what the capabilities need, so that no figure has it. Opens no table: delta-rs must not be forked."""
    import dagster  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.dataset  # noqa: F401

    import spark_jobs.attribution.job
    import spark_jobs.billing.job
    import spark_jobs.corrections.reconcile
    import spark_jobs.ingest.events
    import spark_jobs.ingest.orders
    import spark_jobs.operate.compact
    import spark_jobs.operate.health
    import spark_jobs.operate.settle
    import spark_jobs.operate.status
    import spark_jobs.traffic.review  # noqa: F401


@dataclass(frozen=True)
class Taken:
    """What a run took, with all its threads and processes, and the state that it returned."""

    wall_seconds: float
    cpu_seconds: float
    state: Any = None


def in_child(function: Callable[..., Any], *args: Any) -> Taken:
    """Run a function in a process of its own, forked from this one. Raises BenchmarkError if it failed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            began, before = time.perf_counter(), _cpu_seconds()
            state = function(*args)
            found: Any = Taken(time.perf_counter() - began, _cpu_seconds() - before, state)
        except BaseException:
            found = traceback.format_exc()
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(found, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    taken = pickle.loads(answer) if answer else "it was killed"
    if not isinstance(taken, Taken):
        raise BenchmarkError(str(taken))
    return taken


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Bench:
    """Both homes, and the rounds on them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work = Path(args.work).absolute() / "flat"
        self.spec = HistorySpec(args.days, args.events_a_day, args.batches_a_day)
        specs = [replace(self.spec, days=args.short_days), self.spec]
        self.homes = {spec.days: self._home(spec) for spec in specs}
        self._states: dict[tuple[str, int], Any] = {}

    def _home(self, spec: HistorySpec) -> Settings:
        name = "-".join(map(str, asdict(spec).values()))
        settings = load_settings(home=self.work / name)
        cached = self.work / f"{name}-whole"
        if not cached.exists():
            note(f"history of {spec.days} days")
            shutil.rmtree(settings.home_path, ignore_errors=True)
            in_child(make_history, settings, spec)
            age_commits(settings, spec.days)
            in_child(self._bring_up_to_date, settings, END - DAY + spec.slot / 2)
            in_child(clean_logs, settings)
            os.rename(settings.home_path, cached)
        copy_home(cached, settings.home_path)
        return settings

    def _add(self, settings: Settings, start: datetime) -> None:
        """Land and ingest an hour."""
        ingest = Ingest(settings)
        landed = land(settings, start, HOUR, self.spec.events_a_day // self.spec.batches_a_day)
        for stream, path in landed.items():
            ingest.batch(stream, [path], start + HOUR)
            ingest.checkpoints[stream].compact()

    def _bring_up_to_date(self, settings: Settings, start: datetime) -> None:
        """Add an hour, for which the indexes and catalogues are made again."""
        from spark_jobs.corrections.reconcile import reconcile
        from spark_jobs.operate.settle import settle

        self._add(settings, start)
        settle(settings, now=END)
        reconcile(settings, HourRange(END - DAY, END - DAY + HOUR), now=END)

    def run(self) -> list[dict[str, Any]]:
        """All rounds. The first is not counted: it brings sensors and caches of files up to date."""
        runs: list[dict[str, Any]] = []
        chosen = {name: run for name, run in capabilities().items() if self.args.only in name}
        for number in range(self.args.rounds + 1):
            moment = Moment.of(number)
            homes = list(self.homes.items())[:: 1 if number % 2 else -1]
            for _, settings in homes:
                in_child(self._add, settings, moment.new)
            for (name, capability), (days, settings) in itertools.product(chosen.items(), homes):
                taken = in_child(capability, settings, moment, self._states.get((name, days)))
                self._states[name, days] = taken.state
                if number:
                    figures = {"wall_seconds": taken.wall_seconds, "cpu_seconds": taken.cpu_seconds}
                    runs.append({"round": number, "capability": name, "days": days, **figures, "wrong": []})
            note(f"round {number} of {self.args.rounds}")
        for settings in self.homes.values():
            shutil.rmtree(settings.home_path, ignore_errors=True)
        return runs


def summary_of(runs: list[dict[str, Any]], short: int, long: int) -> list[dict[str, Any]]:
    """A row a capability: medians of both homes, and their ratios."""
    rows = []
    for name in dict.fromkeys(run["capability"] for run in runs):
        row: dict[str, Any] = {"capability": name}
        for unit in ("cpu_seconds", "wall_seconds"):
            of_days = {
                days: statistics.median(run[unit] for run in runs if (run["capability"], run["days"]) == (name, days))
                for days in (short, long)
            }
            row[unit] = {str(days): round(value, 4) for days, value in of_days.items()}
            row["ratio" if unit == "cpu_seconds" else "wall_ratio"] = round(
                max(of_days[long], LEAST) / max(of_days[short], LEAST), 3
            )
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], short: int, long: int, console: Console) -> None:
    """The figures as a table, milliseconds."""
    table = Table("capability", *(f"{unit} ms, {days} days" for unit in ("CPU", "wall") for days in (short, long)), "ratio")
    for row in rows:
        figures = [f"{1000 * row[unit][str(days)]:.0f}" for unit in ("cpu_seconds", "wall_seconds") for days in (short, long)]
        table.add_row(row["capability"], *figures, f"{row['ratio']:.2f}")
    console.print(table)


def add_options(made: argparse.ArgumentParser) -> None:
    """The options of `benchmarks.run flat`, besides the common ones."""
    made.add_argument("--days", type=int, default=90, help="of the long history")
    made.add_argument("--short-days", type=int, default=2)
    made.add_argument("--events-a-day", type=int, default=24_000)
    made.add_argument("--batches-a-day", type=int, default=4)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--only", default="", help="capabilities whose name has this text")
    made.add_argument("--json", action="store_true", dest="as_json", help="the last line is a JSON object with the ratios")


def main(args: argparse.Namespace) -> int:
    """Run it, write the result and print it; `benchmarks.run` calls this."""
    work = Path(args.work).absolute() / "flat"
    work.mkdir(parents=True, exist_ok=True)
    host = machine()
    import_all()
    try:
        with only_one(work):
            runs = Bench(args).run()
    except BenchmarkError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    rows = summary_of(runs, args.short_days, args.days)
    largest = max(row["ratio"] for row in rows)
    document = {
        "scenario": "flat",
        "machine": host | {"load_average_at_end": round(os.getloadavg()[0], 2)},
        "parameters": {
            name: getattr(args, name) for name in ("days", "short_days", "events_a_day", "batches_a_day", "rounds", "only")
        },
        "summary": {"capabilities": rows},
        "targets": [{"name": "largest ratio", "value": largest, "limit": LIMIT, "met": largest <= LIMIT}],
        "runs": runs,
    }
    write_result(args.results, args.name or f"flat-{args.days}", document)
    show(rows, args.short_days, args.days, Console(stderr=args.as_json))
    if args.as_json:
        print(json.dumps({"ratio": largest, "ratios": {row["capability"]: row["ratio"] for row in rows}}))
    return int(args.check and largest > LIMIT)
