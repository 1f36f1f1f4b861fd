"""Landing folders as they are found in the field, ingested and recounted: nothing is lost, nothing hangs, all of it is named."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import lake
import pytest
from pyspark.sql import SparkSession

from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.errors import LandingPathError, UsageError
from spark_jobs.ingest.campaigns import load_campaigns
from spark_jobs.ingest.files.backlog import read_landing
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.ingest.source import FilesSource, Planned
from spark_jobs.operate.health import read_signal
from spark_jobs.operate.status import read_status

pytestmark = pytest.mark.homes

CASES = Path(__file__).resolve().parents[3] / "cases" / "landing"


def land_case(settings: Settings, name: str) -> Path:
    shutil.copytree(CASES / name / "landing", settings.landing_path, dirs_exist_ok=True)
    return settings.landing_path


def move(source: Path, folder: Path) -> None:
    hidden = folder / ".moved"
    shutil.copyfile(source, hidden)
    hidden.rename(folder / source.name)


def accepted(settings: Settings) -> tuple[int, int]:
    found = dict(lake.rows(None, settings, "batch_ledger", "stream; sum(accepted)::bigint", "true group by stream"))
    return found.get("events", 0), found.get("orders", 0)


def check_books(settings: Settings) -> None:
    status = read_status(settings)
    assert (status.conservation_holds, status.problems, status.waiting) == (True, [], [])
    assert reconcile(settings, None).differences == []
    json.dumps([each.examples for each in status.ignored], ensure_ascii=False).encode()


@pytest.mark.parametrize("spelling", ["{0}/nowhere/../home", "/{0}//home", "{0}/link/home"])
def test_any_spelling_of_the_home_reads_all(spark: SparkSession, settings: Settings, tmp_path: Path, spelling: str) -> None:
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    land_case(settings, "home-with-dotdot")
    spelled = load_settings(home=spelling.format(tmp_path))
    assert run_ingest(spelled, spark=spark).accepted == 25
    assert accepted(settings) == (20, 5)
    assert set(lake.rows(spark, settings, "events", "source_file")) == {("events/us/a.jsonl",)}
    assert run_ingest(settings, spark=spark).batches == 0, "the plain spelling is the same home"
    check_books(settings)


def call_read(settings: Settings, stream: str, files: list[Path]) -> None:
    """A checkpoint whose only batch has these files and has ended."""
    folder = settings.checkpoints_path / stream
    for name in ("offsets", "commits", "sources/0"):
        (folder / name).mkdir(parents=True)
    entries = [json.dumps({"path": f.as_uri(), "timestamp": f.stat().st_mtime_ns // 10**6, "batchId": 0}) for f in files]
    now_ms = int(time.time() * 1000)
    (folder / "metadata").write_text(json.dumps({"id": f"query-{stream}"}))
    (folder / "sources" / "0" / "0").write_text("\n".join(["v1", *entries]))
    (folder / "offsets" / "0").write_text("\n".join(["v1", json.dumps({"batchTimestampMs": now_ms}), json.dumps({"logOffset": 0})]))
    (folder / "commits" / "0").write_text("v1\n{}")


def test_files_that_were_called_read_and_not_taken_are_found(settings: Settings) -> None:
    """As earlier versions left them where the home was spelled with `..`."""
    landing = land_case(settings, "home-with-dotdot")
    load_campaigns(settings)
    for stream in ("events", "orders"):
        call_read(settings, stream, [landing / stream / "us" / "a.jsonl"])
    status = read_status(settings)
    assert not status.conservation_holds
    told = "no batch has taken 1 file that the checkpoint calls read, such as"
    assert [p.partition(": adtally")[0] for p in status.problems] == [f"{s}: {told} {s}/us/a.jsonl" for s in ("events", "orders")]
    signal = read_signal(settings, "conservation")
    assert (signal.ok, signal.value) == (False, 2.0)
    reconcile(settings, None, repair=True)
    assert accepted(settings) == (20, 5)
    check_books(settings)


def test_a_planned_file_of_nowhere_is_an_error(spark: SparkSession, settings: Settings) -> None:
    land_case(settings, "home-with-dotdot")
    run_ingest(settings, spark=spark)
    log = settings.checkpoints_path / "events" / "sources" / "0" / "0"
    log.write_text(log.read_text().replace(f"{settings.landing_path}/events", "/nowhere"))
    with pytest.raises(LandingPathError, match=r"/nowhere/us/a\.jsonl"):
        FilesSource(settings, "events").plan(0)


def test_files_of_any_time_are_read_and_so_are_later_ones(spark: SparkSession, settings: Settings) -> None:
    folder = land_case(settings, "file-time-far-ahead") / "events" / "us"
    os.utime(folder / "ms.jsonl", (1_748_858_400_000, 1_748_858_400_000))
    times = [0, -1, -86_400 * 366 * 100, 2**34 - 1, 2**62, -(2**62), 2**31, 253_402_300_800]
    for number, seconds in enumerate(times):
        os.utime(lake.land(settings, f"orders/t{number}/a.jsonl", [order(f"o{number}")]), (seconds, seconds))
    assert run_ingest(settings, spark=spark).accepted == 10 + len(times)
    move(CASES / "file-time-far-ahead" / "later" / "b.jsonl", folder)
    assert [(each.region, each.files) for each in read_status(settings).waiting] == [("us", 1)]
    os.utime(lake.land(settings, "orders/t0/b.jsonl", [order("late")]), (-(2**33), -(2**33)))
    assert run_ingest(settings, spark=spark).accepted == 6
    assert accepted(settings) == (15, len(times) + 1)
    check_books(settings)


def order(order_id: str) -> dict[str, object]:
    return {
        "order_id": order_id,
        "order_time": "2025-06-02T10:00:00Z",
        "user_id": "u-1",
        "store_id": "s-1",
        "total_micros": 1,
        "currency": "EUR",
        "status": "placed",
    }


def test_a_name_that_is_not_utf8_is_named_and_harms_nobody(spark: SparkSession, settings: Settings) -> None:
    folder = land_case(settings, "file-name-not-utf8") / "events" / "us"
    (folder / os.fsdecode(b"latin-\xe9.jsonl")).write_bytes((folder / "a.jsonl").read_bytes().replace(b'"e', b'"x'))
    (settings.landing_path / "campaigns" / os.fsdecode(b"\xe9.csv")).write_text("nonsense")
    notices: list[str] = []
    assert run_ingest(settings, spark=spark, notice=notices.append).accepted == 5
    move(CASES / "file-name-not-utf8" / "later" / "b.jsonl", folder)
    assert run_ingest(settings, spark=spark).accepted == 3
    check_books(settings)
    assert [(each.source, each.reason, each.examples) for each in read_status(settings).ignored] == [
        ("campaigns", "name_not_utf8", [r"campaigns/\xe9.csv"]),
        ("events/us", "name_not_utf8", [r"events/us/latin-\xe9.jsonl"]),
    ]
    assert len(notices) == 1 and r"unreadable: the name is not UTF-8), such as events/us/latin-\xe9.jsonl" in notices[0]


@pytest.mark.timeout(120)
def test_pipes_and_links_are_neither_waited_for_nor_followed(spark: SparkSession, settings: Settings, tmp_path: Path) -> None:
    folder = land_case(settings, "named-pipe") / "events" / "us"
    os.mkfifo(folder / "pipe.jsonl")
    os.mkfifo(settings.landing_path / "campaigns" / "pipe.csv")
    (folder / "self.jsonl").symlink_to("self.jsonl")
    (folder / "passwd.jsonl").symlink_to("/etc/passwd")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.jsonl").write_bytes((folder / "a.jsonl").read_bytes().replace(b'"e', b'"x'))
    (folder.parent / "linked").symlink_to(outside)
    (folder / "folder.jsonl").mkdir()
    shutil.copy(folder / "a.jsonl", folder / "folder.jsonl" / "a.jsonl")
    report = run_ingest(settings, spark=spark)
    assert (report.offered, report.accepted, report.rejected) == (20, 20, 0)
    check_books(settings)
    assert {(each.source, each.reason): each.files for each in read_status(settings).ignored} == {
        ("campaigns", "wrong_kind"): 1,
        ("events", "symlink"): 1,
        ("events/us", "symlink"): 2,
        ("events/us", "wrong_depth"): 1,
        ("events/us", "wrong_kind"): 2,
    }


def test_a_pipe_that_takes_the_place_of_a_planned_file_is_an_unreadable_file(
    spark: SparkSession, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake.land(settings, "events/us/a.jsonl", [lake.event("a")])
    plan = FilesSource.plan

    def replaced(source: FilesSource, batch_id: int) -> Planned:
        planned = plan(source, batch_id)
        for file in planned.files:
            os.unlink(file.path)
            os.mkfifo(file.path)
        return planned

    monkeypatch.setattr(FilesSource, "plan", replaced)
    report = run_ingest(settings, spark=spark)
    assert (report.offered, report.rejected) == (1, 1)
    assert lake.rows(spark, settings, "rejected_events", "source_file; reason_codes") == [
        ("events/us/a.jsonl", ["unreadable_file"])
    ]


def test_files_beside_the_layout_are_noticed(spark: SparkSession, settings: Settings) -> None:
    land_case(settings, "files-beside-the-layout")
    notices: list[str] = []
    assert run_ingest(settings, spark=spark, notice=notices.append).accepted == 5
    assert len(notices) == 1 and notices[0].startswith("5 files where nothing reads them: 1 in events (in no region")
    check_books(settings)
    assert sum(each.files for each in read_status(settings).ignored) == 5
    assert read_signal(settings, "ignored_files").value == 5.0


def test_a_link_that_leads_back_is_refused(spark: SparkSession, settings: Settings) -> None:
    """Spark follows links: two such would keep it listing for ever."""
    lake.land(settings, "events/us/a.jsonl", [lake.event("a")])
    (settings.landing_path / "events" / "us" / "again").symlink_to("..")
    with pytest.raises(UsageError, match="events/us/again is a link to a folder that leads back"):
        run_ingest(settings, spark=spark)


def test_any_names_of_files_are_read_once(spark: SparkSession, settings: Settings) -> None:
    """What Spark really lists and plans, beside what the property test supposes of it."""
    names = [
        "2025-06-02T10:00:00",
        "a b",
        "n\nl",
        "b\\s",
        "%41",
        "x=1",
        "*",
        "{a,b}",
        "é",
        "😀",
        "'\"",
        "[1]",
        "q?",
        "#f",
        " ",
        "-",
    ]
    batched = settings.model_copy(update={"max_files_per_batch": 5})
    for number, name in enumerate(names):
        lake.land(settings, f"events/us/{name}.jsonl", [lake.event(f"e{number}")])
        (settings.landing_path / "events" / "us" / f"{name}.json").write_bytes(b"x")
        (settings.landing_path / "events" / "us" / f"_{name}.jsonl").write_bytes(b"x")
    assert run_ingest(batched, spark=spark).accepted == len(names)
    held = lake.rows(spark, settings, "events", "event_id; source_file")
    assert set(held) == {(f"e{number}", f"events/us/{name}.jsonl") for number, name in enumerate(names)}
    assert [(each.reason, each.files) for each in read_landing(settings).ignored] == [("wrong_ending", len(names))]
    check_books(settings)
