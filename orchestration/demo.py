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
from typing import Any

from rich.progress import Progress

from orchestration.listening import Listener, listening
from orchestration.marts import query_marts
from samples import DAYS, START, events_by_hour, land, read_truth, weeks_until
from services.simulator import simulate
from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import AdtallyError, UsageError
from spark_jobs.ingest.batch import BatchReport
from spark_jobs.lake.locks import INGEST, UP, exclusive

DEFAULT_HOME = Path(".adtally-demo")
MARKER = ".adtally-demo-home"
BATCH_BYTES = 16 * 1024 * 1024
LIMITS = ("future_skew", "hour_grace", "earliest_event_time")

LISTED_USERS = 12
"""Users of the simulated traffic on the operator's list, which the demo puts into its folder of rules."""

ACCOUNTING = ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "unpriced", "invalid_traffic")
MEASURES = ("impressions", "clicks", "spend_nanos", "invalid_impressions", "invalid_clicks", "invalid_spend_nanos")
MONEY = ("spend_nanos", "invalid_spend_nanos")
BILLED = ("spend_micros",)
CREDIT = ("credit_micros", "orders")
MODELS = ("last_click", "first_click", "linear", "position_based", "time_decay")
LISTED_MODELS = MODELS[:3]
LISTED_WINDOW = 7

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


def clean_home(home: Path) -> None:
    """Make an empty demo home. The marker stays while the rest is deleted, so that an interrupted run can be repeated.

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
    kept = {marker, home / UP.file, home / INGEST.file}
    with exclusive(load_settings(home=home), UP, INGEST):
        for path in home.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path not in kept:
                path.unlink()


def demo_settings(home: Path) -> Settings:
    """Return the settings of a demo: every folder is in ``home``, and the limits are those that the truths assume.

    Variables of the environment for these belong to another installation, whose tables a demo must not touch.
    """
    limits = {name: Settings.model_fields[name].default for name in LIMITS}
    return load_settings(
        home=home,
        lakehouse=str(home / "lakehouse"),
        landing=home / "landing",
        max_bytes_per_batch=BATCH_BYTES,
        **limits,
    )


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


def run_demo(home: Path | None, *, events: int, seed: int, progress: Progress, now: datetime | None = None) -> DemoReport:
    """Run the demo in ``home`` (default .adtally-demo) and compare it with the truth. ``progress`` shows the steps while they run.

    Its week is the last one, from Sunday to Saturday, that was over at ``now``. The figures are the same in any week.
    """
    weeks = weeks_until(now or datetime.now(UTC))
    folder = (home or DEFAULT_HOME).absolute()
    settings = demo_settings(folder)  # first: a setting that is refused deletes nothing
    clean_home(folder)
    with progress:
        truths = _land(settings, events, seed, weeks, progress)
        offered = sum(int(truth["totals"]["offered"]) for truth in truths)
        with _dagster(settings) as run_job:
            _ingest(run_job, offered, progress)
            _settle(run_job, progress)
            _build(run_job, progress)
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

    own = {"HOME": settings.home_path, "LAKEHOUSE": settings.lakehouse_uri, "LANDING": settings.landing_path}
    own["MAX_BYTES_PER_BATCH"] = settings.max_bytes_per_batch
    others = {f"ADTALLY_{name.upper()}" for name in LIMITS}
    before = dict(os.environ)
    try:
        os.environ.update({f"ADTALLY_{name}": str(value) for name, value in own.items()})
        for name in others & set(os.environ):
            del os.environ[name]
        with home_instance(settings, captures_output=False) as instance:
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
    """Return the message of the first step that failed."""
    for event in events:
        if event.is_step_failure:
            data = event.step_failure_data
            message = data.user_failure_data.description if data.user_failure_data else None
            return str(message or data.error_display_string.strip().splitlines()[0])
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
    run_job("settlement", lambda line: progress.update(task, note=str(line)))
    progress.update(task, total=1, completed=1, note="settled")


def _build(run_job: RunJob, progress: Progress) -> None:
    task = progress.add_task("4/4 build the marts", total=None, note="")
    run_job("marts_near_real_time", lambda line: progress.update(task, note=str(line)))  # the first build is of all marts
    progress.update(task, total=1, completed=1, note="published")


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
    """Return the currencies of cells, which are the fourth part of their keys."""
    return sorted({key[3] for cells in parts for key in cells})


def by_currency(expected: Cells, got: Cells, names: Iterable[str], currencies: Iterable[str]) -> Figures:
    """Compare as `difference` does, for each currency by itself: amounts of two currencies have no sum."""
    found: Figures = {}
    for currency in currencies:
        truth, marts = ({key: cell for key, cell in cells.items() if key[3] == currency} for cells in (expected, got))
        found |= {f"{name} {currency}": figures for name, figures in difference(truth, marts, names).items()}
    return found


def _compare_counts(settings: Settings, truths: list[dict[str, Any]]) -> Figures:
    """Compare the marts with the truths: by hour and region, by campaign, by bill of a day."""
    hours = difference(
        truth_cells(truths, "accounting", ("region", "event_hour"), ACCOUNTING), accounting_cells(settings), ACCOUNTING
    )
    campaigns = (
        truth_cells(truths, "campaign_hours", ("campaign_id", "region", "event_hour", "currency"), MEASURES),
        campaign_hour_cells(settings),
    )
    bills = truth_cells(truths, "billing", ("event_date", "campaign_id", "store_id", "currency"), BILLED), billing_cells(settings)
    counts = [name for name in MEASURES if name not in MONEY]
    billed = {
        name.replace("spend", "billed"): figures for name, figures in by_currency(*bills, BILLED, _currencies(*bills)).items()
    }
    return hours | difference(*campaigns, counts) | by_currency(*campaigns, MONEY, _currencies(*campaigns)) | billed


def _compare_credit(settings: Settings, truths: list[dict[str, Any]]) -> Figures:
    """Compare the credit of orders for each model: by campaign and window, and by order and touch where the truth lists them."""
    credits = [truth["attribution"] for truth in truths]
    key = ("model", "window_days", "campaign_id", "currency")
    expected, got = truth_cells(credits, "campaigns", key, CREDIT), credit_cells(settings)
    currencies = _currencies(expected, got)
    found: Figures = {}
    for model in MODELS:
        of_model = [{key: cell for key, cell in cells.items() if key[0] == model} for cells in (expected, got)]
        orders = difference(of_model[0], of_model[1], ("orders",))["orders"]
        credit = by_currency(of_model[0], of_model[1], ("credit_micros",), currencies)
        found |= {f"{model}_orders": orders} | {f"{model}_{name}": figures for name, figures in credit.items()}
    listed, touches = truth_touch_cells(credits), touch_cells(settings)
    differ = difference(listed, touches, ("credit_micros",))["credit_micros"][2]  # over all currencies: no sum to show
    return found | {"credited_touches": (len(listed), len(touches), differ)}


def truth_cells(truths: list[dict[str, Any]], part: str, key: tuple[str, ...], names: tuple[str, ...]) -> Cells:
    """Return the named measures by key, from one part of several truths, added up."""
    cells: Cells = {}
    for truth in truths:
        for row in truth[part]:
            cells.setdefault(tuple(row[name] for name in key), Counter()).update({name: row[name] for name in names})
    return cells


def _cells(rows: Iterable[tuple[Any, ...]], width: int, names: tuple[str, ...]) -> Cells:
    return {row[:width]: Counter(dict(zip(names, map(int, row[width:]), strict=True))) for row in rows}


def accounting_cells(settings: Settings) -> Cells:
    """Return ACCOUNTING by region and hour from the published marts."""
    sums = ", ".join(f"sum({name})" for name in ACCOUNTING)
    sql = f"select region, strftime(event_hour, '%Y-%m-%dT%H:%M:%SZ'), {sums} from fct_event_accounting group by all"
    return _cells(query_marts(settings, sql)[1], 2, ACCOUNTING)


def campaign_hour_cells(settings: Settings) -> Cells:
    """Return MEASURES by campaign, region, hour and currency from the published marts."""
    sql = (
        "select campaign_id, region, strftime(date_trunc('hour', event_minute), '%Y-%m-%dT%H:%M:%SZ'), currency, "
        f"{', '.join(f'sum({name})' for name in MEASURES)} from fct_campaign_minute group by all"
    )
    return _cells(query_marts(settings, sql)[1], 4, MEASURES)


def billing_cells(settings: Settings) -> Cells:
    """Return the sums of the billing ledger by day, campaign, store and currency."""
    sql = (
        "select strftime(event_date, '%Y-%m-%d'), campaign_id, store_id, currency, sum(amount_micros) "
        "from fct_billing_ledger group by all"
    )
    return _cells(query_marts(settings, sql)[1], 4, BILLED)


def credit_cells(settings: Settings) -> Cells:
    """Return CREDIT by model, window, campaign and currency."""
    sql = (
        "select model, window_days, campaign_id, currency, sum(credit_micros), count(distinct order_id) "
        "from fct_attribution_credits group by all"
    )
    return _cells(query_marts(settings, sql)[1], 4, CREDIT)


def touch_cells(settings: Settings) -> Cells:
    """Return credit by model, order and touch, for the models and the window that a truth lists order by order."""
    models = ", ".join(f"'{model}'" for model in LISTED_MODELS)
    sql = (
        "select model, order_id, touch_event_id, sum(credit_micros) from fct_attribution_credits "
        f"where window_days = {LISTED_WINDOW} and model in ({models}) group by all"
    )
    return _cells(query_marts(settings, sql)[1], 3, ("credit_micros",))


def truth_touch_cells(credits: list[dict[str, Any]]) -> Cells:
    """Return what `touch_cells` returns, from truths."""
    return {
        (model, row["order_id"], event_id): Counter(credit_micros=micros)
        for credit in credits
        for row in credit["orders"]
        for model in LISTED_MODELS
        for event_id, micros in row[model]
    }
