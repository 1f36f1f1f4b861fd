"""The demo: the main job end to end on the samples and simulated traffic, compared with the known truth."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress

from orchestration.listening import Listener, listening
from orchestration.marts import query_marts
from samples import DAYS, START, events_by_hour, land, read_truth, weeks_until
from services.simulator import simulate
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import AdtallyError, UsageError
from spark_jobs.ingest.batch import BatchReport
from spark_jobs.lake.leases import leases_folder
from spark_jobs.lake.locks import INGEST, UP, exclusive
from spark_jobs.lake.places import open_place

DEFAULT_HOME = Path(".adtally-demo")
MARKER = ".adtally-demo-home"
BATCH_BYTES = 16 * 1024 * 1024
LIMITS = ("future_skew", "hour_grace", "earliest_event_time")

LISTED_USERS = 12
"""Users of the simulated traffic on the operator's list, which the demo puts into its folder of rules."""

ACCOUNTING = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "unpriced", "invalid_traffic")
MEASURES = ("impressions", "clicks", "spend_nanos", "invalid_impressions", "invalid_clicks", "invalid_spend_nanos")
MONEY = ("spend_nanos", "invalid_spend_nanos")
MODELS = ("last_click", "first_click", "linear", "position_based", "time_decay")
LISTED_MODELS = MODELS[:3]
LISTED_WINDOW = 7


class Part(NamedTuple):
    """One part of a truth and the mart with the same cells. ``key`` and ``measures``: name in the truth -> SQL over the mart."""

    name: str
    mart: str
    key: dict[str, str]
    measures: dict[str, str]


_ISO = "'%Y-%m-%dT%H:%M:%SZ'"
_CAMPAIGN = {"campaign_id": "campaign_id", "currency": "currency"}
_SUM_OF_CREDIT = {"credit_micros": "sum(credit_micros)"}
HOURS = Part(
    "accounting",
    "fct_event_accounting",
    {"region": "region", "event_hour": f"strftime(event_hour, {_ISO})"},
    {name: f"sum({name})" for name in ACCOUNTING},
)
CAMPAIGN_HOURS = Part(
    "campaign_hours",
    "fct_campaign_minute",
    {"event_hour": f"strftime(date_trunc('hour', event_minute), {_ISO})", "region": "region", **_CAMPAIGN},
    {name: f"sum({name})" for name in MEASURES},
)
BILLS = Part(
    "billing",
    "fct_billing_ledger",
    {"event_date": "strftime(event_date, '%Y-%m-%d')", "store_id": "store_id", **_CAMPAIGN},
    {"spend_micros": "sum(amount_micros)"},
)
CREDITS = Part(
    "campaigns",
    "fct_attribution_credits",
    {"model": "model", "window_days": "window_days", **_CAMPAIGN},
    {**_SUM_OF_CREDIT, "orders": "count(distinct order_id)"},
)
TOUCHES = Part(
    "orders",
    f"fct_attribution_credits where window_days = {LISTED_WINDOW} and model in {LISTED_MODELS}",
    {"model": "model", "order_id": "order_id", "touch_event_id": "touch_event_id"},
    _SUM_OF_CREDIT,
)

TOP = 3
_CONSERVATION = (
    f"select region, {', '.join(f'sum({name})::bigint' for name in ACCOUNTING[:6])} "
    "from fct_event_accounting group by region order by region"
)
_NET = (
    "select currency, sum(impressions)::bigint, sum(clicks)::bigint, sum(spend_micros), "
    "sum(invalid_impressions)::bigint, sum(invalid_clicks)::bigint, sum(invalid_spend_micros) "
    "from fct_campaign_day group by currency order by currency"
)
_TOP = f"""
select campaign_id, currency, sum(impressions)::bigint, sum(clicks)::bigint, sum(spend_micros)
from fct_campaign_day group by campaign_id, currency
qualify row_number() over (partition by currency order by sum(spend_micros) desc, campaign_id) <= {TOP}
order by currency, sum(spend_micros) desc, campaign_id
"""

_BEST = "select campaign_id, event_date from fct_campaign_day order by spend_nanos desc, campaign_id, event_date limit 1"

Rows = Sequence[Sequence[Any]]
Figures = dict[str, tuple[int, int, int]]
"""Per measure: the truth's total, the marts' total, and the number of cells in which they differ."""
Cells = dict[tuple[Any, ...], Counter[str]]
RunJob = Callable[[str, Listener], None]


def clean_home(home: Path, lakehouse: str | None = None) -> None:
    """Make an empty demo home, and an empty ``lakehouse`` if it is elsewhere.

    The marker stays while the rest is deleted, so that an interrupted run can be repeated.

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
    settings = demo_settings(home, lakehouse)
    place = open_place(settings.lakehouse_uri) if lakehouse is not None else None
    if place is not None and place.find(MARKER) is None:
        if next(place.list(), None) is not None:
            raise UsageError(
                f"{place.uri} is not empty and not the lakehouse of a demo", hint="name another location with --lakehouse"
            )
        place.write(MARKER, b"")
    kept = {marker, home / UP.file, home / INGEST.file}
    with exclusive(settings, UP, INGEST):
        for path in home.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path not in kept:
                path.unlink()
        if place is not None:
            stays = (f"{place.uri}/{MARKER}", leases_folder(settings.state_uri))
            place.delete(file.name for file in place.list() if not f"{place.uri}/{file.name}".startswith(stays))


def demo_settings(home: Path, lakehouse: str | None = None) -> Settings:
    """Return the settings of a demo: every folder is in ``home``, and the limits are those that the truths assume.

    Only ``lakehouse`` may be elsewhere.

    Variables of the environment for these belong to another installation, whose tables a demo must not touch.
    """
    limits = {name: Settings.model_fields[name].default for name in LIMITS}
    return load_settings(
        home=home,
        lakehouse=lakehouse or str(home / "lakehouse"),
        landing=home / "landing",
        max_bytes_per_batch=BATCH_BYTES,
        **limits,
    ).model_copy(update={"dagster_storage": None})


@dataclass(frozen=True)
class DemoReport:
    """The result of a demo: its days, its figures beside the truth's, and rows of the published marts.

    ``conservation``: region and the first six of ACCOUNTING. ``net``: currency, impressions, clicks and micros, then the same of
    invalid traffic. ``top``: campaign, currency, impressions, clicks, micros. ``best``: campaign and day with the highest spend.
    """

    settings: Settings
    weeks: int
    counts: Figures
    credit: Figures
    conservation: Rows
    net: Rows
    top: Rows
    best: tuple[str, date]

    @property
    def first_day(self) -> date:
        """The Sunday of its week."""
        return (START + timedelta(weeks=self.weeks)).date()

    @property
    def last_day(self) -> date:
        """The Saturday of its week."""
        return self.first_day + timedelta(days=DAYS - 1)

    @property
    def is_equal(self) -> bool:
        """Whether every figure equals the truth."""
        return not any(cells for *_, cells in (self.counts | self.credit).values())


def run_demo(
    home: Path | None,
    *,
    events: int,
    seed: int,
    progress: Progress,
    now: datetime | None = None,
    lakehouse: str | None = None,
) -> DemoReport:
    """Run the demo in ``home`` (default .adtally-demo) and compare it with the truth. ``progress`` shows the steps while they run.

    Its week is the last one, from Sunday to Saturday, that was over at ``now``. The figures are the same in any week.
    """
    weeks = weeks_until(now or datetime.now(UTC))
    folder = (home or DEFAULT_HOME).absolute()
    settings = demo_settings(folder, lakehouse)  # first: a setting that is refused deletes nothing
    clean_home(folder, lakehouse)
    with progress:
        truths = _land(settings, events, seed, weeks, progress)
        offered = sum(int(truth["totals"]["offered"]) for truth in truths)
        with _dagster(settings) as run_job:
            _ingest(run_job, offered, progress)
            _run_with_notes(run_job, "settlement", "3/4 invalid traffic, credit, bills", "settled", progress)
            # The first build is of all marts.
            _run_with_notes(run_job, "marts_near_real_time", "4/4 build the marts", "published", progress)
    conservation, net, top, [best] = (query_marts(settings, sql)[1] for sql in (_CONSERVATION, _NET, _TOP, _BEST))
    counts, credit = _compare_counts(settings, truths), _compare_credit(settings, truths)
    return DemoReport(settings, weeks, counts, credit, conservation, net, top, (best[0], best[1]))


def _land(settings: Settings, events: int, seed: int, weeks: int, progress: Progress) -> list[dict[str, Any]]:
    """Land the samples, shifted by ``weeks``, and simulated traffic of the same hours. Return the truths of both.

    The traffic is spread over the hours as the samples are, so that no hour looks unlike those before it.
    """
    task = progress.add_task("1/4 land samples and traffic", total=events, note="")
    simulated = settings.home_path / "simulated"
    truth = simulate(
        simulated,
        events,
        seed,
        start=START + timedelta(weeks=weeks),
        days=DAYS,
        hourly_weights=events_by_hour(),
        listed_users=LISTED_USERS,
        progress=lambda done, total: progress.update(task, completed=done, total=total),
    )
    (simulated / "rules").rename(settings.rules_path)
    # the prefix keeps a file from replacing another one of the same name
    for source in sorted(path for path in simulated.rglob("*") if path.is_file() and path.name != "truth.json"):
        target = settings.landing_path / source.relative_to(simulated).with_name(f"simulated-{source.name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
    shutil.rmtree(simulated)
    land(settings.landing_path, weeks)
    progress.update(task, completed=events, total=events, note=f"{events:,} simulated lines, 60,287 real events")
    return [json.loads(truth.as_json()), read_truth(weeks)]


@contextmanager
def _dagster(settings: Settings) -> Iterator[RunJob]:
    """Yield a function that runs a Dagster job in this process, with ``settings`` and the Dagster instance of the home."""
    from orchestration.up.instance import home_instance

    own = {"HOME": settings.home_path, "LAKEHOUSE": settings.lakehouse_uri, "LANDING": settings.landing_uri}
    own["MAX_BYTES_PER_BATCH"] = settings.max_bytes_per_batch
    others = {f"ADTALLY_{name.upper()}" for name in LIMITS}
    before = dict(os.environ)
    try:
        os.environ.update({f"ADTALLY_{name}": str(value) for name, value in own.items()})
        for name in others & set(os.environ):
            del os.environ[name]
        with home_instance(settings, captures_output=False) as instance:
            from orchestration.alerts.sensors import failure_reason
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
                    reasons = (failure_reason(event) for event in done.all_events if event.is_step_failure)
                    raise AdtallyError(next(reasons, "the run failed"), hint=f"run {done.run_id}; adtally up shows it")

            yield run_job
    finally:
        os.environ.clear()
        os.environ.update(before)


def _ingest(run_job: RunJob, offered: int, progress: Progress) -> None:
    task = progress.add_task("2/4 ingest", total=offered, note="starting Spark")

    def on_batch(batch: object) -> None:
        if isinstance(batch, BatchReport):
            note = f"{batch.stream} batch {batch.batch_id}: {batch.accepted:,} accepted in {batch.seconds:.1f} s"
            progress.update(task, advance=batch.offered if batch.stream == "events" else 0, note=note)

    run_job("ingest", on_batch)


def _run_with_notes(run_job: RunJob, job: str, title: str, done: str, progress: Progress) -> None:
    """Run a job and show its lines as notes of its step."""
    task = progress.add_task(title, total=None, note="")
    run_job(job, lambda line: progress.update(task, note=str(line)))
    progress.update(task, total=1, completed=1, note=done)


def difference(expected: Cells, got: Cells, names: Iterable[str]) -> Figures:
    """Compare the named measures of two tables, cell by cell."""
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


def _currencies(*parts: Cells) -> list[str]:
    """Return the currencies of cells, which are the last part of their keys."""
    return sorted({key[-1] for cells in parts for key in cells})


def by_currency(expected: Cells, got: Cells, names: Iterable[str], currencies: Iterable[str]) -> Figures:
    """Compare as `difference` does, for each currency by itself: amounts of two currencies have no sum."""
    found: Figures = {}
    for currency in currencies:
        truth, marts = ({key: cell for key, cell in cells.items() if key[-1] == currency} for cells in (expected, got))
        found |= {f"{name} {currency}": figures for name, figures in difference(truth, marts, names).items()}
    return found


def _compare_counts(settings: Settings, truths: list[dict[str, Any]]) -> Figures:
    """Compare the marts with the truths: by hour and region, by campaign, by bill of a day."""
    parts = (HOURS, CAMPAIGN_HOURS, BILLS)
    hours, campaigns, bills = ((truth_cells(truths, part), mart_cells(settings, part)) for part in parts)
    counts = [name for name in MEASURES if name not in MONEY]
    billed = by_currency(*bills, BILLS.measures, _currencies(*bills))
    return (
        difference(*hours, ACCOUNTING)
        | difference(*campaigns, counts)
        | by_currency(*campaigns, MONEY, _currencies(*campaigns))
        | {name.replace("spend", "billed"): figures for name, figures in billed.items()}
    )


def _compare_credit(settings: Settings, truths: list[dict[str, Any]]) -> Figures:
    """Compare the credit of orders for each model: by campaign and window, and by order and touch where the truth lists them."""
    credits = [truth["attribution"] for truth in truths]
    both = truth_cells(credits, CREDITS), mart_cells(settings, CREDITS)
    found: Figures = {}
    for model in MODELS:
        expected, got = ({key: cell for key, cell in cells.items() if key[0] == model} for cells in both)
        credit = by_currency(expected, got, ("credit_micros",), _currencies(*both))
        found[f"{model}_orders"] = difference(expected, got, ("orders",))["orders"]
        found |= {f"{model}_{name}": figures for name, figures in credit.items()}
    listed, touches = truth_touch_cells(credits), mart_cells(settings, TOUCHES)
    differ = difference(listed, touches, TOUCHES.measures)["credit_micros"][2]  # over all currencies: no sum to show
    return found | {"credited_touches": (len(listed), len(touches), differ)}


def truth_cells(truths: list[dict[str, Any]], part: Part) -> Cells:
    """Return the cells of one part of several truths, added up."""
    cells: Cells = {}
    for truth in truths:
        for row in truth[part.name]:
            counts = {name: row[name] for name in part.measures}
            cells.setdefault(tuple(row[name] for name in part.key), Counter()).update(counts)
    return cells


def mart_cells(settings: Settings, part: Part) -> Cells:
    """Return the cells of one part from the published marts."""
    sql = f"select {', '.join([*part.key.values(), *part.measures.values()])} from {part.mart} group by all"
    width, rows = len(part.key), query_marts(settings, sql)[1]
    return {row[:width]: Counter(dict(zip(part.measures, map(int, row[width:]), strict=True))) for row in rows}


def truth_touch_cells(credits: list[dict[str, Any]]) -> Cells:
    """Return the cells of TOUCHES, which a truth lists order by order."""
    return {
        (model, row["order_id"], event_id): Counter(credit_micros=micros)
        for credit in credits
        for row in credit["orders"]
        for model in LISTED_MODELS
        for event_id, micros in row[model]
    }
