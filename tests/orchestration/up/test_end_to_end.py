"""``adtally up`` as a team has it: files land, Dagster does the rest, the marts hold the truth, and Ctrl-C leaves nothing."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lake
import pytest
import terminal
from browser import recorded_page
from playwright.sync_api import Browser

from orchestration.marts import query_marts
from orchestration.up.graphql import Webserver
from services.simulator import simulate
from spark_jobs.config import Settings, load_settings
from tests.orchestration.up.deployment import Deployment, asset, launch, processes_of, runs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

HOURS = 5
FILES = 60
ACCOUNTING = ("offered", "accepted", "duplicate", "conflict", "rejected", "late")
# net and invalid, added up: hours that are open when all ends are not reviewed yet
MEASURES = ("impressions", "clicks", "spend_nanos")
PAGES = {
    "/assets/ad_events?view=checks": ("expectations", "Great Expectations over the hour", "stream_lag"),
    "/assets/reconciled_hours?view=partitions": ("Materialized (", "Failed (0)"),
    "/assets/fct_campaign_day": ("One row per UTC day", "gross_spend_micros", "closed_hours_marts"),
    "/runs": ("closed_hours", "marts_near_real_time", "Success"),
    "/automation": ("alert_conservation", "closed_hours_marts_sensor"),
}
"""Pages of the UI, and what a person looks for on them."""
ENDED = {"SUCCESS", "FAILURE", "CANCELED"}

Cells = dict[tuple[Any, ...], Counter[str]]


def traffic(folder: Path) -> dict[str, Any]:
    """Five hours of yesterday evening and the night: the partitions that a fresh home begins with do not have them."""
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    start = midnight - timedelta(hours=HOURS - 1)
    simulate(folder, 12_000, 11, start=start, days=HOURS / 24, lines_per_file=600)
    found: dict[str, Any] = json.loads((folder / "truth.json").read_text("utf-8"))
    return found


def land_in_parts(folder: Path, settings: Settings, parts: int, *, pause_seconds: float) -> None:
    """Rename the files into the landing folder as collectors do, the oldest first, in several goes."""
    files = sorted((path for path in folder.rglob("*") if path.is_file() and path.name != "truth.json"), key=_age)
    size = -(-len(files) // parts)
    for part in range(parts):
        for source in files[part * size : (part + 1) * size]:
            target = settings.landing_path / source.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
        time.sleep(pause_seconds)


def _age(path: Path) -> tuple[int, int, str]:
    return (0 if path.suffix == ".csv" else 1, path.stat().st_mtime_ns, str(path))


def expected(truth: dict[str, Any], part: str, key: tuple[str, ...], names: tuple[str, ...]) -> Cells:
    cells: Cells = {}
    for row in truth[part]:
        cells.setdefault(tuple(row[name] for name in key), Counter()).update({name: row[name] for name in names})
    return {cell: +counts for cell, counts in cells.items() if +counts}


def found(settings: Settings, sql: str, width: int, names: tuple[str, ...]) -> Cells:
    rows = query_marts(settings, sql)[1]
    cells = {row[:width]: +Counter(dict(zip(names, map(int, row[width:]), strict=True))) for row in rows}
    return {cell: counts for cell, counts in cells.items() if counts}


def differences(settings: Settings, truth: dict[str, Any]) -> list[str]:
    """In which cells the marts differ from the truth."""
    accounting = (
        f"select region, strftime(event_hour, '%Y-%m-%dT%H:%M:%SZ'), {', '.join(f'sum({n})' for n in ACCOUNTING)} "
        "from fct_event_accounting group by all"
    )
    minutes = (
        "select campaign_id, region, strftime(date_trunc('hour', event_minute), '%Y-%m-%dT%H:%M:%SZ'), currency, "
        f"{', '.join(f'sum({n} + invalid_{n})' for n in MEASURES)} from fct_campaign_minute group by all"
    )
    gross = [{**row, **{name: row[name] + row[f"invalid_{name}"] for name in MEASURES}} for row in truth["campaign_hours"]]
    pairs = (
        (expected(truth, "accounting", ("region", "event_hour"), ACCOUNTING), found(settings, accounting, 2, ACCOUNTING)),
        (
            expected({"campaign_hours": gross}, "campaign_hours", ("campaign_id", "region", "event_hour", "currency"), MEASURES),
            found(settings, minutes, 4, MEASURES),
        ),
    )
    return [
        f"{cell}: {want.get(cell)} {got.get(cell)}" for want, got in pairs for cell in want | got if want.get(cell) != got.get(cell)
    ]


def test_files_land_and_the_marts_hold_the_truth(tmp_path: Path, browser: Browser) -> None:
    home = tmp_path / "home"
    settings = load_settings(home=home)
    truth = traffic(tmp_path / "traffic")
    (tmp_path / "gql.py").write_text("raise ImportError('a file of the working folder is not the package that Dagster wants')")
    with Deployment(home, "--trigger", "1s") as up:
        web = up.wait_until_ready()
        second = terminal.run("--home", str(home), "up", "--port", "0", cwd=tmp_path)
        assert (second.status, second.error) == (1, f"adtally up runs on {home} already (stop it, or name another --home)")

        land_in_parts(tmp_path / "traffic", settings, 3, pause_seconds=4)
        offered = sum(row["offered"] for row in truth["accounting"])
        up.wait_for("all is ingested", lambda: ingested(home, tmp_path) == offered, seconds=300)
        up.wait_for("the earlier partitions are there", lambda: bool(up.said("the definitions are loaded again")), seconds=300)
        up.wait_for("hours close", lambda: "closed_hours" in {run["jobName"] for run in runs(web)}, seconds=300)
        asked = launch(web, "marts_near_real_time")
        statuses: dict[str, str] = {}

        def settled() -> bool:
            statuses.update({run["runId"]: run["status"] for run in runs(web)})
            return statuses.get(asked) in ENDED and set(statuses.values()) <= ENDED

        up.wait_for("all runs end", settled, seconds=600)
        failed = [run for run in runs(web) if run["status"] != "SUCCESS"]
        assert failed == [], up.report("runs failed")
        assert differences(settings, truth) == []

        hours = {row["event_hour"] for row in truth["accounting"] if row["accepted"]}
        up.wait_for("every hour is reported", lambda: reported(web) == partitions(hours), seconds=120)
        events = asset(web, "ad_events")
        assert events["partitionStats"]["numFailed"] == 0
        rows: dict[str, int] = {}
        for event in events["assetMaterializations"]:  # the newest first
            entries = {entry["label"]: entry.get("intValue") for entry in event["metadataEntries"]}
            rows.setdefault(event["partition"], entries["rows_in_hour"])
        accepted = Counter[str]()
        for row in truth["accounting"]:
            if row["accepted"]:
                accepted[partition(row["event_hour"])] += row["accepted"]
        assert {hour: count for hour, count in rows.items() if count} == accepted
        recounted = asset(web, "reconciled_hours")
        assert recounted["partitionStats"]["numMaterialized"] >= HOURS - 3
        checks = {check["name"]: check["executionForLatestMaterialization"] for check in recounted["assetChecksOrError"]["checks"]}
        assert checks["recount_equals_stream"] == {"status": "SUCCEEDED"}
        for address, says in PAGES.items():
            with recorded_page(browser) as recorded:
                recorded.open(f"{web.address}{address}")
                recorded.wait_for_text(*says)
                assert recorded.foreign_requests(web.address) == []

        assert len(processes_of(home)) >= 8  # four guards and what they guard
        assert up.end() == 0, up.report("exit status")
        assert up.lines[-1] == "all ended"
        assert processes_of(home) == []
    assert open_to_others(home, settings.landing_path) == []
    assert not [line for line in up.lines if "Traceback" in line]
    assert terminal.run("--home", str(home), "status", cwd=tmp_path).status == 0


def test_runs_that_are_cut_off_are_made_again_and_nothing_is_left_behind(tmp_path: Path) -> None:
    """Without the continuous ingest, so that Dagster ingests: ended by Ctrl-C in the middle of it, then killed in the middle."""
    home = tmp_path / "home"
    settings = load_settings(home=home)
    settings.landing_path.parent.mkdir()
    for n in range(FILES):
        lake.land(settings, f"events/eu/{n}.jsonl", [lake.event(f"e{n}-{m}") for m in range(50)])
    # small batches, so that there is a middle; and a login, which what adtally itself asks of the webserver needs as well
    slowly = {"ADTALLY_MAX_FILES_PER_BATCH": "1", "ADTALLY_WEBSERVER_TOKEN": "a-token-of-32-characters-at-least"}

    def ingest_starts(up: Deployment, web: Webserver) -> None:
        started = {("ingest", "STARTED")}
        up.wait_for("an ingest starts", lambda: started <= {(r["jobName"], r["status"]) for r in runs(web)}, seconds=300)

    with Deployment(home, "--no-ingest", **slowly) as up:
        ingest_starts(up, up.wait_until_ready())
        assert up.end() == 0, up.report("exit status")
        assert up.said("cancelling 1 run in progress"), up.report("not cancelled")
        assert processes_of(home) == []

    with Deployment(home, "--no-ingest", **slowly) as up:
        web = up.wait_until_ready()
        up.wait_for("the cancelled run is made again", lambda: bool(up.said("is made again as")), seconds=60)
        ingest_starts(up, web)
        up.process.kill()
        deadline = time.monotonic() + 120
        while processes_of(home):
            assert time.monotonic() < deadline, up.report(f"left: {[process.cmdline() for process in processes_of(home)]}")
            time.sleep(0.2)

    with Deployment(home, "--no-ingest", **slowly) as up:
        web = up.wait_until_ready()
        up.wait_for("all is ingested", lambda: ingested(home, tmp_path) == FILES * 50, seconds=300)
        assert up.end(signal.SIGTERM) == 0, up.report("exit status")
        assert processes_of(home) == []
    assert terminal.run("--home", str(home), "status", cwd=tmp_path).status == 0


def open_to_others(home: Path, besides: Path) -> list[str]:
    """What other users could read of a home, but for what this test itself has put into the landing folder."""
    found = (path for path in [home, *home.rglob("*")] if not path.is_relative_to(besides) and not path.is_symlink())
    return [f"{path} {path.stat().st_mode:o}" for path in found if path.stat().st_mode & 0o077]


def ingested(home: Path, folder: Path) -> int:
    done = terminal.run("--home", str(home), "status", "--json", cwd=folder)
    sources = json.loads(done.out)["sources"] if done.out else []
    return sum(source["offered"] for source in sources if source["stream"] == "events")


def partition(hour: str) -> str:
    return datetime.fromisoformat(hour).strftime("%Y-%m-%d-%H:%M")


def partitions(hours: set[str]) -> set[str]:
    return {partition(hour) for hour in hours}


def reported(web: Any) -> set[str]:
    materializations = asset(web, "ad_events")["assetMaterializations"]
    return {event["partition"] for event in materializations if _rows(event)}


def _rows(event: dict[str, Any]) -> int:
    return next((entry["intValue"] for entry in event["metadataEntries"] if entry["label"] == "rows_added"), 0)
