"""The main job end to end on the samples and simulated traffic, held to the known truth."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from orchestration.cli.status import table
from orchestration.listening import Listener, listening
from orchestration.marts import query_marts
from orchestration.up.up import UP_LOCK
from samples.land import land
from services.simulator import simulate
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import AdtallyError, BusyError, UsageError
from spark_jobs.jobs.batch import BatchReport
from spark_jobs.jobs.ingest import INGEST_LOCK

DEFAULT_HOME = Path(".adtally-demo")
MARKER = ".adtally-demo-home"
BATCH_BYTES = 16 * 1024 * 1024
TRAFFIC_START = datetime(2019, 12, 1, tzinfo=UTC)  # where the samples end, so that the hours of the demo have no gap

LIMITS = ("future_skew", "hour_grace", "earliest_event_time")

LISTED_USERS = 12
"""Users of the simulated traffic on the operator's list, which the demo puts into its folder of rules."""

ACCOUNTING = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "unpriced", "invalid_traffic")
MEASURES = ("impressions", "clicks", "spend_nanos", "invalid_impressions", "invalid_clicks", "invalid_spend_nanos")
CREDIT = ("credit_micros", "orders")
MODELS = ("last_click", "first_click", "linear", "position_based", "time_decay")
LISTED_MODELS = MODELS[:3]
LISTED_WINDOW = 7

Cells = dict[tuple[Any, ...], Counter[str]]
RunJob = Callable[[str, Listener], None]


def clean_home(home: Path) -> None:
    """An empty demo home. The marker stays while the rest is deleted: what is interrupted can be run again.

    Raises UsageError for a folder that is not a demo's, of which nothing is deleted, or that cannot be made; BusyError
    where an ingest or ``adtally up`` runs on it.
    """
    marker = home / MARKER
    try:
        if home.exists() and any(home.iterdir()) and not marker.exists():
            raise UsageError(f"{home} is not empty and not the home of a demo", hint="name another folder with --home")
        home.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise UsageError(f"{home} cannot be made: {error.strerror}", hint="name another folder with --home") from None
    locks = {home / UP_LOCK: "adtally up", home / INGEST_LOCK: "an ingest"}
    try:
        with ExitStack() as held:
            for lock in locks:
                held.enter_context(FileLock(lock, timeout=0))
            for path in home.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path != marker and path not in locks:
                    path.unlink()
    except Timeout as busy:
        runs = locks[Path(busy.lock_file)]
        raise BusyError(f"{runs} runs on {home}", hint="stop it, or name another folder with --home") from None


def demo_settings(home: Path) -> Settings:
    """Settings of a demo: everything lies in ``home``, and the limits are those that the truths suppose.

    What the environment says of these is meant for another installation, whose tables a demo must not touch.
    """
    limits = {name: Settings.model_fields[name].default for name in LIMITS}
    return load_settings(
        home=home,
        lakehouse=str(home / "lakehouse"),
        landing=home / "landing",
        max_bytes_per_batch=BATCH_BYTES,
        **limits,
    )


def run_demo(home: Path | None, *, events: int, seed: int, console: Console) -> bool:
    """Run the demo in ``home`` (default .adtally-demo); True if every figure equals the truth."""
    folder = (home or DEFAULT_HOME).absolute()
    settings = demo_settings(folder)  # first: a setting that is refused deletes nothing
    clean_home(folder)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        truths = _land(settings, events, seed, progress)
        offered = sum(int(truth["totals"]["offered"]) for truth in truths)
        with _dagster(settings) as run_job:
            _ingest(run_job, offered, progress)
            _settle(run_job, progress)
            _build(run_job, progress)
    _print_conservation(settings, console)
    equal = _print_differences(settings, truths, console)
    _print_invalid(settings, console)
    _print_campaigns(settings, console)
    _print_places(settings, console)
    return equal


def _land(settings: Settings, events: int, seed: int, progress: Progress) -> list[dict[str, Any]]:
    task = progress.add_task("1/4 land samples and traffic", total=events, note="")
    simulated = settings.home_path / "simulated"
    truth = simulate(
        simulated,
        events,
        seed,
        start=TRAFFIC_START,
        listed_users=LISTED_USERS,
        progress=lambda done, total: progress.update(task, completed=done, total=total),
    )
    (simulated / "rules").rename(settings.rules_path)
    # names of their own: a file that lands under a name already taken would replace the other
    for source in sorted(path for path in simulated.rglob("*") if path.is_file() and path.name != "truth.json"):
        target = settings.landing_path / source.relative_to(simulated).with_name(f"simulated-{source.name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
    shutil.rmtree(simulated)
    sample_truth = land(settings.landing_path)
    progress.update(task, completed=events, total=events, note=f"{events:,} simulated lines, 60,287 real events")
    return [json.loads(truth.as_json()), json.loads(sample_truth.read_text("utf-8"))]


@contextmanager
def _dagster(settings: Settings) -> Iterator[RunJob]:
    """Runs jobs of this project in this process, with ``settings``, as runs of the home's own Dagster instance."""
    from orchestration.up.instance import home_instance

    own = {"HOME": settings.home_path, "LAKEHOUSE": settings.lakehouse_uri, "LANDING": settings.landing_path}
    own["MAX_BYTES_PER_BATCH"] = settings.max_bytes_per_batch
    others = {f"ADTALLY_{name.upper()}" for name in LIMITS}
    before = dict(os.environ)
    try:
        os.environ.update({f"ADTALLY_{name}": str(value) for name, value in own.items()})
        for name in others & set(os.environ):
            del os.environ[name]
        with home_instance(settings) as instance:
            from orchestration.definitions import build_definitions

            definitions = build_definitions(settings)

            def run_job(name: str, listener: Listener) -> None:
                with listening(listener):
                    done = definitions.resolve_job_def(name).execute_in_process(
                        instance=instance,
                        raise_on_error=False,
                        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                    )
                if not done.success:
                    raise AdtallyError(_failure(done.all_events), hint=f"run {done.run_id}; adtally up shows it")

            yield run_job
    finally:
        os.environ.clear()
        os.environ.update(before)


def _failure(events: Iterable[Any]) -> str:
    """What the first step that failed says."""
    for event in events:
        if event.is_step_failure:
            data = event.step_failure_data
            told = data.user_failure_data.description if data.user_failure_data else None
            return str(told or data.error_display_string.strip().splitlines()[0])
    return "the run failed"


def _ingest(run_job: RunJob, offered: int, progress: Progress) -> None:
    task = progress.add_task("2/4 ingest", total=offered, note="starting Spark")

    def on_batch(batch: object) -> None:
        if isinstance(batch, BatchReport):
            note = f"{batch.stream} batch {batch.batch_id}: {batch.accepted:,} accepted in {batch.seconds:.1f} s"
            progress.update(task, advance=batch.offered if batch.stream == "events" else 0, note=note)

    run_job("ingest", on_batch)


def _settle(run_job: RunJob, progress: Progress) -> None:
    task = progress.add_task("3/4 invalid traffic, credit, bills", total=None, note="")
    run_job("settlement", lambda line: progress.update(task, note=str(line)[:60]))
    progress.update(task, total=1, completed=1, note="settled")


def _build(run_job: RunJob, progress: Progress) -> None:
    task = progress.add_task("4/4 build the marts", total=None, note="")
    run_job("marts_near_real_time", lambda line: progress.update(task, note=str(line)[:60]))  # the first build is of all marts
    progress.update(task, total=1, completed=1, note="published")


def _print_conservation(settings: Settings, console: Console) -> None:
    _, rows = query_marts(
        settings,
        "select region, sum(offered)::bigint, sum(accepted)::bigint, sum(duplicate)::bigint, sum(conflict)::bigint, "
        "sum(rejected)::bigint, sum(late)::bigint from fct_event_accounting group by region order by region",
    )
    shown = table("Every record ends in exactly one place", "region", *ACCOUNTING[:6], "offered - all four")
    for region, *counts in rows:
        rest = counts[0] - sum(counts[1:5])
        shown.add_row(region, *(f"{count:,}" for count in counts), str(rest))
    console.print(shown)


def difference(expected: Cells, got: Cells, names: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """Per measure: the truth's total, the marts' total, and the number of cells in which they differ."""
    keys = expected.keys() | got.keys()
    empty: Counter[str] = Counter()
    return {
        name: (
            sum(cell[name] for cell in expected.values()),
            sum(cell[name] for cell in got.values()),
            sum(1 for key in keys if expected.get(key, empty)[name] != got.get(key, empty)[name]),
        )
        for name in names
    }


def _print_differences(settings: Settings, truths: list[dict[str, Any]], console: Console) -> bool:
    """Every figure beside the truth's, and in how many places they differ; True if in none."""
    hours = difference(
        truth_cells(truths, "accounting", ("region", "event_hour"), ACCOUNTING), accounting_cells(settings), ACCOUNTING
    )
    campaigns = difference(
        truth_cells(truths, "campaign_hours", ("campaign_id", "region", "event_hour", "currency"), MEASURES),
        campaign_hour_cells(settings),
        MEASURES,
    )
    bills = difference(
        truth_cells(truths, "billing", ("event_date", "campaign_id", "store_id", "currency"), ("spend_micros",)),
        billing_cells(settings),
        ("spend_micros",),
    )
    shown = table(
        "Against the known truth, per hour and region, per campaign, per bill of a day",
        "measure",
        "truth",
        "marts",
        "cells that differ",
    )
    found = {**hours, **campaigns, "billed_micros": bills["spend_micros"]}
    for name, figures in found.items():
        _add_figures(shown, name, figures)
    console.print(shown)
    return all([not any(cells for *_, cells in found.values()), _print_credit(settings, truths, console)])


def _add_figures(shown: Table, name: str, figures: tuple[int, int, int]) -> None:
    truth, marts, cells = figures
    shown.add_row(name, f"{truth:,}", f"{marts:,}", str(cells), style="red" if cells else "")


def _print_credit(settings: Settings, truths: list[dict[str, Any]], console: Console) -> bool:
    """Credit of orders per model: of each campaign and window, and of each order and touch where the truth lists them."""
    credits = [truth["attribution"] for truth in truths]
    key = ("model", "window_days", "campaign_id", "currency")
    expected, got = truth_cells(credits, "campaigns", key, CREDIT), credit_cells(settings)
    shown = table(
        "Credit of orders against the known truth, per campaign and lookback window, per order and touch",
        *("measure", "truth", "marts", "cells that differ"),
    )
    equal = True
    for model in MODELS:
        of_model = [{key: cell for key, cell in cells.items() if key[0] == model} for cells in (expected, got)]
        for name, figures in difference(of_model[0], of_model[1], CREDIT).items():
            _add_figures(shown, f"{model}_{name}", figures)
            equal &= not figures[2]
    by_touch = difference(truth_touch_cells(credits), touch_cells(settings), ("credit_micros",))
    _add_figures(shown, "credit_of_touches", by_touch["credit_micros"])
    console.print(shown)
    return equal and not by_touch["credit_micros"][2]


def truth_cells(truths: list[dict[str, Any]], part: str, key: tuple[str, ...], names: tuple[str, ...]) -> Cells:
    """A part of truth.json, several truths added up: per key the named measures."""
    cells: Cells = {}
    for truth in truths:
        for row in truth[part]:
            cells.setdefault(tuple(row[name] for name in key), Counter()).update({name: row[name] for name in names})
    return cells


def _cells(rows: Iterable[tuple[Any, ...]], width: int, names: tuple[str, ...]) -> Cells:
    return {row[:width]: Counter(dict(zip(names, map(int, row[width:]), strict=True))) for row in rows}


def accounting_cells(settings: Settings) -> Cells:
    """ACCOUNTING by region and hour, as the published marts have it."""
    sums = ", ".join(f"sum({name})" for name in ACCOUNTING)
    sql = f"select region, strftime(event_hour, '%Y-%m-%dT%H:%M:%SZ'), {sums} from fct_event_accounting group by all"
    return _cells(query_marts(settings, sql)[1], 2, ACCOUNTING)


def campaign_hour_cells(settings: Settings) -> Cells:
    """MEASURES by campaign, region, hour and currency, as the published marts have them."""
    sql = (
        "select campaign_id, region, strftime(date_trunc('hour', event_minute), '%Y-%m-%dT%H:%M:%SZ'), currency, "
        f"{', '.join(f'sum({name})' for name in MEASURES)} from fct_campaign_minute group by all"
    )
    return _cells(query_marts(settings, sql)[1], 4, MEASURES)


def billing_cells(settings: Settings) -> Cells:
    """What the billing ledger sums up to by day, campaign, store and currency."""
    sql = (
        "select strftime(event_date, '%Y-%m-%d'), campaign_id, store_id, currency, sum(amount_micros) "
        "from fct_billing_ledger group by all"
    )
    return _cells(query_marts(settings, sql)[1], 4, ("spend_micros",))


def credit_cells(settings: Settings) -> Cells:
    """CREDIT by model, window, campaign and currency."""
    sql = (
        "select model, window_days, campaign_id, currency, sum(credit_micros), count(distinct order_id) "
        "from fct_attribution_credits group by all"
    )
    return _cells(query_marts(settings, sql)[1], 4, CREDIT)


def touch_cells(settings: Settings) -> Cells:
    """Credit by model, order and touch, for the models and the window that a truth lists order by order."""
    models = ", ".join(f"'{model}'" for model in LISTED_MODELS)
    sql = (
        "select model, order_id, touch_event_id, sum(credit_micros) from fct_attribution_credits "
        f"where window_days = {LISTED_WINDOW} and model in ({models}) group by all"
    )
    return _cells(query_marts(settings, sql)[1], 3, ("credit_micros",))


def truth_touch_cells(credits: list[dict[str, Any]]) -> Cells:
    """As `touch_cells`, from truths."""
    return {
        (model, row["order_id"], event_id): Counter(credit_micros=micros)
        for credit in credits
        for row in credit["orders"]
        for model in LISTED_MODELS
        for event_id, micros in row[model]
    }


def _print_invalid(settings: Settings, console: Console) -> None:
    """What is billed and what is not, per currency."""
    _, rows = query_marts(
        settings,
        "select currency, sum(impressions)::bigint, sum(clicks)::bigint, sum(spend_micros)::bigint, "
        "sum(invalid_impressions)::bigint, sum(invalid_clicks)::bigint, sum(invalid_spend_micros)::bigint "
        "from fct_campaign_day group by currency order by currency",
    )
    names = ("impressions", "clicks", "spend")
    shown = table("Net and invalid", "currency", *names, *(f"invalid {name}" for name in names))
    for currency, impressions, clicks, micros, invalid_shown, invalid_clicked, invalid_micros in rows:
        net = (f"{impressions:,}", f"{clicks:,}", _money(micros))
        shown.add_row(currency, *net, f"{invalid_shown:,}", f"{invalid_clicked:,}", _money(invalid_micros))
    console.print(shown)


def _money(micros: int) -> str:
    return f"{micros // 10**6:,}.{micros % 10**6:06d}"


def _print_campaigns(settings: Settings, console: Console) -> None:
    _, rows = query_marts(
        settings,
        "select campaign_id, currency, sum(impressions)::bigint, sum(clicks)::bigint, sum(spend_micros)::bigint "
        "from fct_campaign_day group by all order by sum(spend_micros) desc, 1 limit 5",
    )
    shown = table("Top campaigns by spend", "campaign", "currency", "impressions", "clicks", "spend", left=2)
    for campaign, currency, impressions, clicks, micros in rows:
        shown.add_row(campaign, currency, f"{impressions:,}", f"{clicks:,}", _money(micros))
    console.print(shown)


def _print_places(settings: Settings, console: Console) -> None:
    home = settings.home_path
    console.print(f"landing files  {settings.landing_path}", soft_wrap=True)
    console.print(f"Delta tables   {settings.lakehouse_uri}", soft_wrap=True)
    console.print(f"marts          {settings.marts_path}", soft_wrap=True)
    console.print("\nNext, in the environment (or with `uv run` before each):")
    _, [(campaign, day)] = query_marts(
        settings, "select campaign_id, event_date from fct_campaign_day order by spend_nanos desc, campaign_id, event_date limit 1"
    )
    explain = f"explain fct_campaign_day --campaign {campaign} --date {day}"
    for command in ("status", 'query "select * from fct_campaign_day limit 10"', explain, "reconcile", "up"):
        console.print(f"  ADTALLY_HOME={home} adtally {command}", soft_wrap=True)
