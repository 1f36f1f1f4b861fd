"""Commands on a lakehouse in an object store do what they do on a disk: the same records give the same answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import correct
import pytest
from local import LocalEvents, LocalOrders
from store import Bucket, Disk, variables
from terminal import Done, environment, run

from services.simulator import simulate
from spark_jobs.config import Settings
from spark_jobs.ingest.campaigns import load_campaigns
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.places import StorePlace
from spark_jobs.lake.tables import MINUTE_METRICS

Homes = tuple[Settings, Settings]

BATCH_FILES = 4
DAY = ("--from", "2025-06-02", "--to", "2025-06-03")
COMMANDS = (
    (("status",), lambda found: [found["sources"], found["rejects"], found["problems"], found["conservation_holds"]]),
    (("rejects", "--limit", "1000"), lambda found: found),
    (("hours", "close", "--through", "2025-06-04T00:00:00Z", "--reason", "a test"), lambda found: found),
    (("hours", "list"), lambda found: found),
    (("review",), lambda found: found),
    (("attribute",), lambda found: found),
    (("bill",), lambda found: found),
    (("compact",), lambda found: len(found["tables"])),
    (("backfill", *DAY), lambda found: found),
    (("reconcile", "--repair"), lambda found: found),
    (("vacuum", "--dry-run"), lambda found: [table["table"] for table in found["tables"]]),
    (("vacuum",), lambda found: [table["table"] for table in found["tables"]]),
    (("fsck", "--repair"), lambda found: [found["findings"], found["left_out"]]),
    (("release", "--list"), lambda found: found),
)
OF_MARTS = (
    (("marts", "build"), lambda found: sorted(found)),
    (("query", "select * from fct_campaign_day order by all", "--format", "json"), lambda found: found),
)
CHANGES = re.compile(r"seconds|run_id|build_id|mart_build|version|bytes|lag_seconds|.*_at|spend_parts")
"""The fields in which two runs differ; the parts of a spend name the runs of reviews."""


@pytest.fixture(scope="module")
def homes(store: dict[str, str], tmp_path_factory: pytest.TempPathFactory, empty_lakehouse: Path) -> Homes:
    """Two homes with the same landing folder and batches: one has its tables on a disk, one in the store."""
    folder = tmp_path_factory.mktemp("both")
    landing = folder / "landing"
    simulate(landing, 2_000, seed=3, lines_per_file=400)
    made = [place.settings(folder / name, landing=landing) for name, place in (("disk", Disk()), ("store", Bucket()))]
    for settings, place in zip(made, (Disk(), Bucket()), strict=True):
        place.copy(str(empty_lakehouse), settings.lakehouse_uri)
        load_campaigns(settings)
        for stream in (LocalEvents(settings, "events"), LocalOrders(settings, "orders")):
            files = sorted((landing / stream.stream).rglob("*.jsonl*"))
            for at in range(0, len(files), BATCH_FILES):
                stream.take_landed(files[at : at + BATCH_FILES])
    return made[0], made[1]


def command(settings: Settings, *arguments: str) -> Done:
    """Run a command on a home, as a process. DuckDB's threads read the environment, so no test may change it beside them."""
    return run(*arguments, cwd=settings.home_path, env=environment(**variables(settings)), timeout=300)


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two answers differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for name in one for found in differences(one[name], other[name], f"{at}.{name}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [found for number in range(len(one)) for found in differences(one[number], other[number], f"{at}[{number}]")]
    return [] if one == other else [f"{at}: {one} and {other}"]


def steady(value: Any) -> Any:
    """An answer without what two runs differ in."""
    if isinstance(value, dict):
        return {name: steady(one) for name, one in value.items() if not CHANGES.fullmatch(name)}
    return [steady(one) for one in value] if isinstance(value, list) else value


def answer(settings: Settings, arguments: tuple[str, ...], keep: Callable[[Any], Any]) -> tuple[int, Any]:
    """The exit status of a command and what is kept of its answer."""
    done = command(settings, *arguments, *(() if arguments[0] == "query" else ("--json",)))
    assert done.status in (0, 1), (arguments, settings.lakehouse_uri, done)
    return done.status, steady(keep(json.loads(done.out)))


def assert_same_answers(homes: Homes, commands: tuple[tuple[tuple[str, ...], Callable[[Any], Any]], ...]) -> None:
    with ThreadPoolExecutor(len(homes)) as both:
        for arguments, keep in commands:
            on_disk, in_store = both.map(answer, homes, repeat(arguments), repeat(keep))
            assert differences(on_disk, in_store) == [], arguments
            assert in_store[0] == 0, (arguments, in_store)


def test_fsck_repairs_what_was_deleted_cut_or_changed_in_the_store(homes: Homes, tmp_path: Path) -> None:
    settings = Bucket().copied(homes[1], tmp_path / "home")
    truth = correct.contents(settings)
    place = StorePlace(settings.table_uri(MINUTE_METRICS.name))
    deleted, cut, changed, *_ = Lake(settings).pin(MINUTE_METRICS).paths(MINUTE_METRICS)
    place.delete([deleted])
    place.write(cut, place.read(cut)[:-50])
    content = place.read(changed)
    place.write(changed, content[:40] + bytes([content[40] ^ 255]) + content[41:])
    found = command(settings, "fsck", "--json")
    assert found.status == 1
    kinds = {one["path"]: one["kind"] for one in json.loads(found.out)["findings"]}
    assert kinds == {deleted: "file_missing", cut: "file_size", changed: "file_damaged"}
    assert command(settings, "fsck", "--repair").status == 0
    assert correct.contents(settings) == truth


def test_each_command_gives_the_same_answer(homes: Homes) -> None:
    assert_same_answers(homes, COMMANDS)
    on_disk, in_store = (correct.contents(settings, identity=False) for settings in homes)
    assert in_store == on_disk


@pytest.mark.services
def test_marts_are_the_same(homes: Homes) -> None:
    assert_same_answers(homes, OF_MARTS)


def test_doctor_tries_the_store_and_shows_no_credential(homes: Homes, store: dict[str, str]) -> None:
    _, settings = homes

    def doctor(**changes: str) -> tuple[Done, dict[str, Any]]:
        done = run("doctor", "--json", cwd=settings.home_path, env=environment(**{**variables(settings), **changes}))
        return done, next(check for check in json.loads(done.out)["checks"] if check["name"] == "lakehouse")

    done, check = doctor()
    assert check == {"name": "lakehouse", "ok": True, "detail": f"{settings.lakehouse_uri} answers; conditional puts hold"}
    wrong, check = doctor(AWS_SECRET_ACCESS_KEY="not-the-secret")
    assert not check["ok"]
    assert check["detail"].startswith(f"put {settings.lakehouse_uri}/_adtally/doctor/")
    for shown in (done.out, done.err, wrong.out, wrong.err):
        assert store["AWS_SECRET_ACCESS_KEY"] not in shown
        assert "not-the-secret" not in shown
