"""The demo: what it may delete, what it compares, and one run of all of it."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
import terminal
from dagster import AssetKey, DagsterRunStatus
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._core.storage.noop_compute_log_manager import NoOpComputeLogManager
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress
from terminal import environment

from expectations.trailing import MAX_ROBUST_Z, MAX_STABILITY_INDEX, MIN_ROWS, TrailingWeek, robust_z, stability_index
from orchestration import demo
from orchestration.cli import app
from orchestration.cli.demo_report import Steps, show_demo
from orchestration.demo import (
    ACCOUNTING,
    LISTED_MODELS,
    MARKER,
    MEASURES,
    MODELS,
    clean_home,
    demo_settings,
    difference,
)
from orchestration.listening import Listener
from orchestration.up.instance import home_instance
from samples import DAYS, START
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, BusyError, ConfigurationError, UsageError
from spark_jobs.lake.locks import INGEST, UP
from spark_jobs.lake.places import open_place

SHARES = ("region", "event_type", "campaign_id", "outcome")
LIMITS_OF_DRIFT = {"volume": MAX_ROBUST_Z}

# A home of its own


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name not in (INGEST.file, UP.file)}


def test_a_new_home_is_marked(tmp_path: Path) -> None:
    clean_home(tmp_path / "new" / "home")
    assert names(tmp_path / "new" / "home") == {MARKER}
    (tmp_path / "empty").mkdir()
    clean_home(tmp_path / "empty")
    assert names(tmp_path / "empty") == {MARKER}


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lakehouse").mkdir()
    (tmp_path / "lakehouse" / "table").write_text("mine")
    with pytest.raises(UsageError, match=r"is not empty and not the home of a demo .*--home") as caught:
        clean_home(tmp_path)
    assert caught.value.exit_code == 2
    assert names(tmp_path) == {"lakehouse"}
    assert (tmp_path / "lakehouse" / "table").read_text() == "mine"


def test_a_second_run_starts_clean(tmp_path: Path) -> None:
    home = tmp_path / "home"
    clean_home(home)
    (home / "lakehouse" / "events").mkdir(parents=True)
    (home / "lakehouse" / "events" / "old.parquet").touch()
    (home / "stray").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (home / "landing").symlink_to(outside)
    clean_home(home)
    assert names(home) == {MARKER}
    assert names(outside) == {"kept"}  # a link is removed, not what it leads to


def test_a_clean_up_that_was_interrupted_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean_home(tmp_path)
    (tmp_path / "lakehouse").mkdir()

    def interrupted(_path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(demo.shutil, "rmtree", interrupted)  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            clean_home(tmp_path)
    clean_home(tmp_path)
    assert names(tmp_path) == {MARKER}


@pytest.mark.parametrize(("lock", "what"), [(INGEST.file, r"another ingest \(or fsck\)"), (UP.file, "adtally up")])
def test_a_home_on_which_something_runs_is_left_alone(tmp_path: Path, lock: str, what: str) -> None:
    clean_home(tmp_path)
    (tmp_path / "lakehouse").mkdir()
    with FileLock(tmp_path / lock), pytest.raises(BusyError, match=f"{what} runs on"):
        clean_home(tmp_path)
    assert names(tmp_path) == {MARKER, "lakehouse"}


def test_a_lakehouse_of_somebody_else_in_a_store_is_left_alone(prefix: str, tmp_path: Path) -> None:
    open_place(prefix).write("events/mine", b"mine")
    clean_home(tmp_path)
    (tmp_path / "kept").touch()
    with pytest.raises(UsageError, match=r"is not empty and not the lakehouse of a demo .*--lakehouse"):
        clean_home(tmp_path, prefix)
    assert [file.name for file in open_place(prefix).list()] == ["events/mine"]
    assert "kept" in names(tmp_path)


def test_a_second_run_in_a_store_starts_clean(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = f"{prefix}-other"
    monkeypatch.setenv("ADTALLY_LAKEHOUSE", other)
    clean_home(tmp_path, prefix)
    for name in ("events/_delta_log/0.json", "_adtally/checkpoints/events/metadata"):
        open_place(prefix).write(name, b"{}")
    clean_home(tmp_path, prefix)
    assert {file.name for file in open_place(prefix).list()} == {MARKER, "_adtally/leases/ingest.json"}
    clean_home(tmp_path / "home")
    assert list(open_place(other).list()) == [], "that of another installation is not touched"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_home_that_cannot_be_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"{place} cannot be made: "):
        clean_home(tmp_path / place)


def test_the_demo_touches_no_other_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and landing folders of the environment, and limits other than those that the truths suppose, are not the demo's."""
    for name in ("HOME", "LAKEHOUSE", "LANDING"):
        monkeypatch.setenv(f"ADTALLY_{name}", str(tmp_path / "production"))
    monkeypatch.setenv("ADTALLY_HOUR_GRACE", "0")
    monkeypatch.setenv("ADTALLY_FUTURE_SKEW", "86400")
    monkeypatch.setenv("ADTALLY_EARLIEST_EVENT_TIME", "2026-01-01T00:00:00Z")
    monkeypatch.setenv("ADTALLY_DRIVER_MEMORY", "3g")
    settings = demo_settings(tmp_path / "home")
    assert settings.home_path == tmp_path / "home"
    assert settings.lakehouse_uri == str(tmp_path / "home" / "lakehouse")
    assert settings.landing_path == tmp_path / "home" / "landing"
    assert (settings.hour_grace, settings.future_skew) == (timedelta(minutes=15), timedelta(minutes=5))
    assert settings.earliest_event_time.year == 2000
    assert settings.driver_memory == "3g"  # of this machine, whatever the installation


def test_a_setting_that_is_refused_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean_home(tmp_path)
    (tmp_path / "lakehouse").mkdir()
    monkeypatch.setenv("ADTALLY_SHUFFLE_PARTITIONS", "0")
    with pytest.raises(ConfigurationError):
        show_demo(tmp_path, events=1, seed=1, console=Console(file=io.StringIO()))
    assert names(tmp_path) == {MARKER, "lakehouse"}


# Its progress


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bar_clock_and_note_fit_every_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with Steps(console) as progress:
        task = progress.add_task("3/4 invalid traffic, credit, bills", total=10, note="starting Spark")
        progress.update(task, completed=4, note="events batch 3: 146,037 accepted in 12.3 s")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    bar, note = shown.rstrip().splitlines()[-2:]
    assert re.fullmatch(r"3/4 invalid traffic, credit, bills [━╺╸ ]{14} 0:00:0\d *", bar)
    assert note.strip() == "events batch 3: 146,037 accepted in 12.3 s"


def test_a_step_leaves_the_terminal_to_the_progress(tmp_path: Path) -> None:
    """Dagster's own capture puts a file in the place of standard output, and the clock would stand still."""
    for captures, manager in ((False, NoOpComputeLogManager), (True, LocalComputeLogManager)):
        with home_instance(demo_settings(tmp_path), captures_output=captures) as instance:
            assert isinstance(instance.compute_log_manager, manager)


# The comparison


def test_difference_counts_cells_not_only_totals() -> None:
    expected: demo.Cells = {("eu", "10"): Counter(a=3, b=1), ("eu", "11"): Counter(a=2)}
    assert difference(expected, copy.deepcopy(expected), ("a", "b")) == {"a": (5, 5, 0), "b": (1, 1, 0)}
    moved = {("eu", "10"): Counter(a=2, b=1), ("eu", "11"): Counter(a=3)}
    assert difference(expected, moved, ("a", "b")) == {"a": (5, 5, 2), "b": (1, 1, 0)}
    lost = {("eu", "10"): Counter(a=3, b=1)}
    assert difference(expected, lost, ("a", "b")) == {"a": (5, 3, 1), "b": (1, 1, 0)}
    strange = {**expected, (None, "12"): Counter(a=0, b=7)}
    assert difference(expected, strange, ("a", "b")) == {"a": (5, 5, 0), "b": (1, 8, 1)}
    assert difference({}, {}, ("a",)) == {"a": (0, 0, 0)}


CREDITED = {f"{model}_{name}" for model in MODELS for name in ("orders", "credit")} | {"credited_touches"}
# a measure of money has a line a currency
COMPARED = {*ACCOUNTING, *(name.removesuffix("_nanos") for name in MEASURES), "billed", *CREDITED}

HOUR = "2026-03-10T10:00:00Z"
LATER = "2026-03-10T11:00:00Z"


def accounting(region: str | None, hour: str | None, **counts: int) -> dict[str, Any]:
    return {"region": region, "event_hour": hour, **dict.fromkeys(ACCOUNTING, 0), **counts}


def campaign(name: str, hour: str, **counts: int) -> dict[str, Any]:
    return {"campaign_id": name, "region": "eu", "event_hour": hour, "currency": "EUR", **dict.fromkeys(MEASURES, 0), **counts}


def bill(name: str, micros: int) -> dict[str, Any]:
    return {"event_date": HOUR[:10], "campaign_id": name, "store_id": "s1", "currency": "EUR", "spend_micros": micros}


def credit(model: str, window: int, name: str, micros: int, orders: int) -> dict[str, Any]:
    key = {"model": model, "window_days": window, "campaign_id": name, "currency": "EUR"}
    return {**key, "credit_micros": micros, "orders": orders}


def credited(order_id: str, event_id: str, micros: int) -> dict[str, Any]:
    return {"order_id": order_id, **{model: [] for model in LISTED_MODELS}, "last_click": [[event_id, micros]]}


# Two truths, as the demo has: of the simulated traffic and of the samples. They share an hour.
TRUTHS: list[dict[str, Any]] = [
    {
        "totals": {"offered": 8},
        "accounting": [
            accounting("eu", HOUR, offered=6, accepted=4, duplicate=1, conflict=1, late=2, invalid_traffic=2),
            accounting("eu", None, offered=2, rejected=2),
        ],
        "campaign_hours": [
            campaign("c1", HOUR, impressions=3, clicks=1, spend_nanos=1250, invalid_clicks=2, invalid_spend_nanos=9)
        ],
        "billing": [bill("c1", 1)],
        "attribution": {
            "campaigns": [credit("last_click", 7, "c1", 500, 2), credit("linear", 30, "c1", 250, 1)],
            "orders": [
                credited("o1", "e1", 300),
                credited("o2", "e2", 200),
                {"order_id": "o3", **{model: [] for model in LISTED_MODELS}},
            ],
        },
    },
    {
        "totals": {"offered": 3},
        "accounting": [accounting("eu", HOUR, offered=1, accepted=1, unpriced=1), accounting("us", LATER, offered=2, accepted=2)],
        "campaign_hours": [
            campaign("c1", HOUR, impressions=1),
            campaign("c2", LATER, clicks=2, spend_nanos=9_007_199_254_740_993),
        ],
        "billing": [bill("c2", 9_007_199_254_741)],
        "attribution": {"campaigns": [credit("last_click", 7, "c2", 1, 1)], "orders": [credited("o4", "e4", 1)]},
    },
]


def write_marts(settings: Settings) -> None:
    """The two marts that the demo compares, with what the truths come to, and one for its last table."""
    settings.marts_path.parent.mkdir(parents=True)
    with duckdb.connect(str(settings.marts_path)) as connection:
        columns = ", ".join(f"{name} bigint" for name in ACCOUNTING)
        connection.execute(f"create table fct_event_accounting (event_hour timestamp, region varchar, {columns})")
        connection.execute(
            "insert into fct_event_accounting values ('2026-03-10 10:00', 'eu', 7, 5, 1, 1, 0, 2, 1, 2), "
            "(null, 'eu', 2, 0, 0, 0, 2, 0, 0, 0), ('2026-03-10 11:00', 'us', 2, 2, 0, 0, 0, 0, 0, 0)"
        )
        connection.execute(
            "create table fct_campaign_minute (event_minute timestamp, region varchar, campaign_id varchar, currency varchar, "
            + ", ".join(f"{name} bigint" for name in MEASURES)
            + ")"
        )
        connection.execute(
            "insert into fct_campaign_minute values ('2026-03-10 10:05', 'eu', 'c1', 'EUR', 3, 0, 0, 0, 1, 4), "
            "('2026-03-10 10:59', 'eu', 'c1', 'EUR', 1, 1, 1250, 0, 1, 5), "
            "('2026-03-10 11:00', 'eu', 'c2', 'EUR', 0, 2, 9007199254740993, 0, 0, 0)"
        )
        connection.execute(
            "create table fct_campaign_day as select date '2026-03-10' as event_date, 'c1' as campaign_id, 'EUR' as currency, "
            "4 as impressions, 1 as clicks, 0 as spend_nanos, 1234567 as spend_micros, 0 as invalid_impressions, "
            "2 as invalid_clicks, 7654321 as invalid_spend_micros"
        )
        connection.execute(
            "create table fct_billing_ledger (event_date date, campaign_id varchar, store_id varchar, currency varchar, "
            "amount_micros bigint)"
        )
        connection.execute(
            "insert into fct_billing_ledger values ('2026-03-10', 'c1', 's1', 'EUR', 3), ('2026-03-10', 'c1', 's1', 'EUR', -2), "
            "('2026-03-10', 'c2', 's1', 'EUR', 9007199254741)"
        )
        connection.execute(
            "create table fct_attribution_credits (model varchar, window_days bigint, campaign_id varchar, currency varchar, "
            "order_id varchar, touch_event_id varchar, credit_micros bigint)"
        )
        connection.execute(
            "insert into fct_attribution_credits values ('last_click', 7, 'c1', 'EUR', 'o1', 'e1', 300), "
            "('last_click', 7, 'c1', 'EUR', 'o2', 'e2', 200), ('linear', 30, 'c1', 'EUR', 'o1', 'e1', 250), "
            "('last_click', 7, 'c2', 'EUR', 'o4', 'e4', 1)"
        )


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[dict[str, Any]]], None]:
    """Let the demo find the given truths and the marts of ``write_marts``, without Spark or dbt."""

    def stage(truths: list[dict[str, Any]]) -> None:
        monkeypatch.setattr(demo, "_land", lambda *_: truths)

        def jobs(settings: Settings) -> AbstractContextManager[demo.RunJob]:
            def run_job(name: str, _: Listener) -> None:
                if name == "marts_near_real_time":
                    write_marts(settings)

            return nullcontext(run_job)

        monkeypatch.setattr(demo, "_dagster", jobs)

    return stage


def label(measure: str) -> str:
    return f"{measure.removesuffix('_nanos')} EUR" if measure.endswith("_nanos") else measure


def compared_figures(printed: str) -> dict[str, list[str]]:
    """The tables of differences: measure and currency -> truth, marts, cells that differ."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    return {line[0]: line[1:] for line in lines if line[0].split(" ")[0] in COMPARED and len(line) == 4}


def show(home: Path) -> tuple[bool, dict[str, list[str]]]:
    """Whether the demo is content, and its table of differences: measure -> truth, marts, cells that differ."""
    output = io.StringIO()
    content = show_demo(home, events=1, seed=1, console=Console(file=output, width=140))
    return content, compared_figures(output.getvalue())


def test_equal_figures_content_it(tmp_path: Path, staged: Callable[..., None]) -> None:
    staged(TRUTHS)
    content, shown = show(tmp_path)
    assert content
    assert {name.split(" ")[0] for name in shown} == COMPARED
    assert {cells for *_, cells in shown.values()} == {"0"}
    assert shown["offered"] == ["11", "11", "0"]
    assert shown["last_click_credit EUR"] == ["0.000501", "0.000501", "0"]
    assert shown["credited_touches"] == ["3", "3", "0"]
    assert shown["billed EUR"] == ["9,007,199.254742", "9,007,199.254742", "0"]
    assert shown["spend EUR"] == ["9,007,199.254742243", "9,007,199.254742243", "0"]


def test_amounts_of_two_currencies_are_never_added_up(tmp_path: Path, staged: Callable[..., None]) -> None:
    altered = copy.deepcopy(TRUTHS)
    altered[0]["campaign_hours"][0]["currency"] = "JPY"  # the marts have all of it in EUR
    staged(altered)
    content, shown = show(tmp_path)
    assert not content
    assert shown["spend JPY"] == ["0.00000125", "0", "1"]
    assert shown["spend EUR"] == ["9,007,199.254740993", "9,007,199.254742243", "1"]


@pytest.mark.parametrize(
    ("part", "measure"), [*(("accounting", name) for name in ACCOUNTING), *(("campaign_hours", name) for name in MEASURES)]
)
@pytest.mark.parametrize("by", [-1, 1])
def test_one_too_many_or_too_few_is_seen(tmp_path: Path, staged: Callable[..., None], part: str, measure: str, by: int) -> None:
    altered = copy.deepcopy(TRUTHS)
    altered[1][part][-1][measure] += by
    staged(altered)
    content, shown = show(tmp_path)
    assert not content
    assert {name: row[2] for name, row in shown.items() if row[2] != "0"} == {label(measure): "1"}


def test_a_wrong_bill_and_a_wrong_credit_are_seen(tmp_path: Path, staged: Callable[..., None]) -> None:
    def wrong(change: Callable[[dict[str, Any]], None]) -> dict[str, str]:
        altered = copy.deepcopy(TRUTHS)
        change(altered[0])
        staged(altered)
        content, shown = show(tmp_path)
        assert not content
        shutil.rmtree(tmp_path)
        return {name: row[2] for name, row in shown.items() if row[2] != "0"}

    assert wrong(lambda truth: truth["billing"][0].update(spend_micros=2)) == {"billed EUR": "1"}
    assert wrong(lambda truth: truth["billing"][0].update(store_id="s2")) == {"billed EUR": "2"}
    campaigns = {"last_click_credit EUR": "1"}
    assert wrong(lambda truth: truth["attribution"]["campaigns"][0].update(credit_micros=501)) == campaigns
    assert wrong(lambda truth: truth["attribution"]["campaigns"][1].update(orders=2)) == {"linear_orders": "1"}
    moved = {"linear_credit EUR": "2", "linear_orders": "2"}
    assert wrong(lambda truth: truth["attribution"]["campaigns"][1].update(window_days=28)) == moved
    touched = {"credited_touches": "2"}
    assert wrong(lambda truth: truth["attribution"]["orders"][0].update(last_click=[["e9", 300]])) == touched


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("accounting", "region", "us"),
        ("accounting", "event_hour", None),
        ("campaign_hours", "campaign_id", "c9"),
        ("campaign_hours", "region", "us"),
        ("campaign_hours", "event_hour", LATER),
    ],
)
def test_right_totals_in_the_wrong_place_are_seen(
    tmp_path: Path, staged: Callable[..., None], part: str, key: str, value: str | None
) -> None:
    altered = copy.deepcopy(TRUTHS)
    altered[0][part][0][key] = value
    staged(altered)
    content, shown = show(tmp_path)
    assert not content
    assert all(truth == marts for truth, marts, _ in shown.values())
    assert sum(int(cells) for *_, cells in shown.values()) > 0


def test_a_difference_is_exit_status_1(tmp_path: Path, staged: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    staged(TRUTHS)
    assert app.run(["--home", str(tmp_path / "home"), "demo"]) == 0
    altered = copy.deepcopy(TRUTHS)
    altered[0]["accounting"][0]["duplicate"] += 1
    staged(altered)
    assert app.run(["--home", str(tmp_path / "home"), "demo"]) == 1
    out, err = capsys.readouterr()
    assert "1.234567" in out and err == ""


# Its runs


def test_a_run_that_fails_says_why_and_leaves_the_environment_alone(tmp_path: Path) -> None:
    settings = demo_settings(tmp_path / "home")
    before = dict(os.environ)
    said = r"no marts without the Delta tables .*\(run [0-9a-f-]{36}; adtally up shows it\)"
    with pytest.raises(AdtallyError, match=said), demo._dagster(settings) as run_job:
        assert os.environ["ADTALLY_HOME"] == str(settings.home_path)
        run_job("marts_near_real_time", lambda _: None)
    assert dict(os.environ) == before
    with home_instance(settings) as instance:
        assert [run.status for run in instance.get_runs()] == [DagsterRunStatus.FAILURE]


# What it lands


def test_no_hour_of_the_demo_looks_unlike_those_before_it(tmp_path: Path) -> None:
    """By the truths, with the judgement of the expectations: shares by region, type and campaign, outcomes, and volume."""
    settings = demo_settings(tmp_path / "home")
    with Progress(disable=True) as progress:
        truths = demo._land(settings, 200_000, 7, 300, progress)
    shares: defaultdict[tuple[str, datetime], Counter[str]] = defaultdict(Counter)
    for row in (row for truth in truths for row in truth["campaign_hours"]):
        hour = datetime.fromisoformat(row["event_hour"])
        counts = {kind: row[kind] + row[f"invalid_{kind}"] for kind in ("impressions", "clicks")}
        shares["event_type", hour].update(counts)
        for name in ("region", "campaign_id"):
            shares[name, hour][row[name]] += sum(counts.values())
    for row in (row for truth in truths for row in truth["accounting"] if row["event_hour"]):
        shares["outcome", datetime.fromisoformat(row["event_hour"])].update(
            {name: row[name] for name in ("accepted", "duplicate", "conflict", "rejected")}
        )
    week = TrailingWeek(tmp_path / "trailing", "events")
    judged, warned = Counter[str](), []
    first = START + timedelta(weeks=300)
    end = first + timedelta(days=DAYS)  # a click may follow its impression into the hour behind it, which stays open
    hours = sorted(hour for name, hour in shares if name == "region" and hour < end)
    for hour in hours:
        found = {name: {value: float(n) for value, n in shares[name, hour].items()} for name in SHARES}
        volume, moved = sum(found["region"].values()), {}
        for name in SHARES:
            before = week.shares(hour, name)
            if before and min(sum(before.values()), sum(found[name].values())) >= MIN_ROWS:
                moved[name] = stability_index(before, found[name])
        if volumes := week.volumes(hour):
            moved["volume"] = robust_z(volumes, volume)
        judged.update(moved.keys())
        warned += [(hour, name) for name, value in moved.items() if value > LIMITS_OF_DRIFT.get(name, MAX_STABILITY_INDEX)]
        week.keep(hour, volume, found)
    assert warned == []
    assert min(judged[name] for name in (*SHARES, "volume")) > 50
    assert {hour.date() for hour in hours} == {(first + timedelta(days=day)).date() for day in range(DAYS)}


# All of it


def test_the_demo_end_to_end(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    (home / MARKER).touch()
    stray = home / "landing" / "events" / "eu-west" / "stray.jsonl"  # of a run before: would be counted
    stray.parent.mkdir(parents=True)
    stray.write_text('{"event_id": "stray"}\n')
    env = environment(ADTALLY_LAKEHOUSE=str(elsewhere), ADTALLY_LANDING=str(elsewhere))
    done = terminal.run("--home", "home", "demo", "--events", "3000", cwd=tmp_path, env=env, timeout=500)
    assert done.status == 0, done.err
    assert done.err == "" and "WARN" not in done.out  # Java's own lines are in logs/java.log
    assert not stray.exists() and not elsewhere.exists()
    compared = compared_figures(done.out)
    assert {name.split(" ")[0] for name in compared} == COMPARED
    assert done.out.splitlines()[-1] == f"{len(compared)} measures, 0 differ: the marts equal the known truth"
    assert all(truth == marts and cells == "0" for truth, marts, cells in compared.values())
    samples = json.loads((terminal.ROOT / "samples" / "truth.json").read_text("utf-8"))
    assert int(compared["offered"][0].replace(",", "")) == 3000 + samples["totals"]["offered"]
    with home_instance(demo_settings(home)) as instance:  # what it did is what Dagster shows
        runs = {run.job_name: run.status for run in instance.get_runs()}
        assert runs == dict.fromkeys(("ingest", "settlement", "marts_near_real_time"), DagsterRunStatus.SUCCESS)
        for asset in ("landing_ingest", "settled_records", "fct_campaign_day", "dim_campaign"):
            assert instance.get_latest_materialization_event(AssetKey(asset)), asset
    # what it says to do next works
    status = terminal.run("status", "--json", cwd=tmp_path, env=environment(ADTALLY_HOME=str(home)))
    assert status.status == 0
    found = json.loads(status.out)
    assert found["conservation_holds"] and found["problems"] == []
    offered = sum(source["offered"] for source in found["sources"] if source["stream"] == "events")
    assert offered == 3000 + samples["totals"]["offered"]
