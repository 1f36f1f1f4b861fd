"""Landing folders and rules on a real object store: ingested and recounted as from a disk, and listed without listing all."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import lake
import pytest
import sparkless
from pyspark.sql import SparkSession
from store import variables as store_variables
from terminal import PROGRAM, ROOT, environment
from truths import assert_truth

from services.simulator import simulate
from spark_jobs.config import Settings, load_settings
from spark_jobs.corrections.reconcile import reconcile
from spark_jobs.errors import ConservationError, StoreError
from spark_jobs.ingest.campaigns import load_campaigns
from spark_jobs.ingest.files.backlog import read_landing
from spark_jobs.ingest.files.landing import Reason
from spark_jobs.ingest.release import release_file
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.ingest.stream import StreamJob
from spark_jobs.lake import store as object_store
from spark_jobs.lake.landing_view import land_folder, refresh_landing
from spark_jobs.lake.places import open_place
from spark_jobs.operate.status import read_status
from spark_jobs.steps import CRASH_VARIABLE, Step


@pytest.fixture
def home(prefix: str, tmp_path: Path) -> Settings:
    """A home whose landing folder and rules are in the store; the tables are on the disk."""
    return load_settings(home=tmp_path / "home", landing=f"{prefix}/landing", rules=f"{prefix}/rules")


def put(home: Settings, name: str, content: bytes) -> None:
    open_place(home.landing_uri).write(name, content)


def put_campaigns(home: Settings) -> None:
    header = "campaign_id,store_id,billing_model,daily_budget_micros,currency,valid_from,valid_to"
    rows = ("c-cpm,s-1,cpm,1000000,EUR,2000-01-01T00:00:00Z,", "c-cpc,s-1,cpc,1000000,EUR,2000-01-01T00:00:00Z,")
    put(home, "campaigns/campaigns.csv", "\n".join([header, *rows, ""]).encode())


def test_simulated_traffic_is_read_from_a_bucket_to_the_row(spark: SparkSession, home: Settings, tmp_path: Path) -> None:
    truth = json.loads(simulate(tmp_path / "made", 6_000, seed=11, lines_per_file=700, listed_users=3).as_json())
    (tmp_path / "made" / "rules").rename(tmp_path / "rules")
    land_folder(tmp_path / "made", home.landing_uri)
    land_folder(tmp_path / "rules", home.rules_uri)
    run_ingest(home.model_copy(update={"max_files_per_batch": 3}), spark=spark)
    total = lake.ledger(spark, home)
    for name in ("offered", "accepted", "duplicate", "conflict", "rejected", "late", "unpriced"):
        assert total[name] == truth["totals"][name], name
    assert any(path.name.endswith(".gz") for path in home.landing_path.glob("events/*/*")), "a part of the files is compressed"
    found = reconcile(home, None)
    assert (found.differences, read_status(home).waiting) == ([], [])


def ingest(home: Settings, stream: str = "events") -> dict[str, int]:
    """Ingest by the jobs of a batch, without Spark, as one machine would; the totals of the batches."""
    refresh_landing(home, is_full=True)
    reports = sparkless.ingest(home, stream)
    return {name: sum(getattr(report, name) for report in reports) for name in ("offered", "accepted", "duplicate", "rejected")}


@pytest.fixture
def ready(home: Settings, empty_lakehouse: Path) -> Settings:
    """The home, with its tables and prices."""
    shutil.copytree(empty_lakehouse, home.lakehouse_uri)
    put_campaigns(home)
    refresh_landing(home)
    load_campaigns(home)
    return home


def test_odd_keys_are_read_or_reported(ready: Settings) -> None:
    read = ("a b.jsonl", "100%20.jsonl", "{x}[y]*?.jsonl", "é\u4e2d~#&+=@:;,$!'().jsonl", "c.jsonl.gz", "..d.jsonl".lstrip("."))
    for number, name in enumerate(read):
        data = lake.lines([lake.event(f"e{number}")])
        put(ready, f"events/us/{name}", gzip.compress(data) if name.endswith(".gz") else data)
    put(ready, "events/us/_hidden.jsonl", b"x\n")
    put(ready, "events/us/.hidden.jsonl", b"x\n")
    put(ready, "events/us", b"x\n")
    strays = {
        "events/us/x/deep.jsonl": Reason.WRONG_DEPTH,
        "events/us/a.txt": Reason.WRONG_ENDING,
        "events/US/a.jsonl": Reason.REGION_NAME,
        "events/a.jsonl": Reason.NO_REGION,
        "other/a.jsonl": Reason.UNKNOWN_FOLDER,
        "campaigns/c.txt": Reason.WRONG_ENDING,
    }
    for name in strays:
        put(ready, name, b"x\n")
    assert ingest(ready) == {"offered": len(read), "accepted": len(read), "duplicate": 0, "rejected": 0}
    report = read_landing(ready)
    ignored = {example: one.reason for one in report.ignored for example in one.examples}
    assert (report.waiting, ignored) == ([], strays | {"events/us": Reason.IMPOSSIBLE_KEY})
    assert reconcile(ready, None).differences == []


def test_an_overwritten_object_is_reported_and_not_read_again(ready: Settings) -> None:
    put(ready, "events/us/a.jsonl", lake.lines([lake.event("e1")]))
    assert ingest(ready)["accepted"] == 1
    time.sleep(1.05)  # the store's times have whole seconds
    put(ready, "events/us/a.jsonl", lake.lines([lake.event("e2")]))
    refresh_landing(ready, is_full=True)
    assert ingest(ready)["offered"] == 0
    [ignored] = read_landing(ready).ignored
    assert (ignored.reason, ignored.examples) == (Reason.CHANGED, ["events/us/a.jsonl"])


def test_an_object_whose_key_sorts_before_those_read_is_read(ready: Settings) -> None:
    put(ready, "events/us/b.jsonl", lake.lines([lake.event("e1")]))
    assert ingest(ready)["accepted"] == 1
    put(ready, "events/us/a.jsonl", lake.lines([lake.event("e1"), lake.event("e2")]))
    [waiting] = read_landing(ready.model_copy(update={"landing_sweep": ready.landing_sweep * 0})).waiting
    assert (waiting.files, waiting.oldest) == (1, "events/us/a.jsonl")
    found = open_place(ready.landing_uri).find("events/us/a.jsonl")
    assert found is not None and waiting.waiting_since.replace(microsecond=0) == found.modified
    assert ingest(ready) == {"offered": 2, "accepted": 1, "duplicate": 1, "rejected": 0}


def test_many_small_objects_come_out_in_their_order(ready: Settings) -> None:
    for number in range(40):
        put(ready, f"events/us/{number:03d}.jsonl", lake.lines([lake.event(f"e{number}"), lake.event(f"e{number % 7}")]))
    put(ready, "orders/us/a.jsonl", lake.lines([lake.order("o1"), lake.order("o2")]))
    assert ingest(ready) == {"offered": 80, "accepted": 40, "duplicate": 40, "rejected": 0}
    assert ingest(ready, "orders")["accepted"] == 2
    assert reconcile(ready, None).differences == []


def test_a_lost_view_is_rebuilt_and_nothing_is_read_again(ready: Settings) -> None:
    put(ready, "events/us/a.jsonl", lake.lines([lake.event("e1")]))
    assert ingest(ready)["accepted"] == 1
    shutil.rmtree(ready.landing_path)
    shutil.rmtree(ready.recount_path, ignore_errors=True)
    put(ready, "events/us/b.jsonl", lake.lines([lake.event("e2")]))
    assert read_landing(ready).waiting[0].files == 1
    assert ingest(ready) == {"offered": 1, "accepted": 1, "duplicate": 0, "rejected": 0}
    assert reconcile(ready, None).differences == []


@pytest.mark.parametrize("change", ["overwritten", "deleted"])
def test_an_object_that_changes_while_a_batch_reads_it_fails_the_batch(
    ready: Settings, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    put(ready, "events/us/a.jsonl", lake.lines([lake.event("e1")]))
    put(ready, "events/us/b.jsonl", lake.lines([lake.event("e2")]))
    inner = StreamJob._stage

    def changing(self: StreamJob[Any], *arguments: Any) -> Any:
        if change == "overwritten":
            put(ready, "events/us/b.jsonl", lake.lines([lake.event("e3")]))
        else:
            open_place(ready.landing_uri).delete(["events/us/b.jsonl"])
        return inner(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(StreamJob, "_stage", changing)
        with pytest.raises(ConservationError, match=r"events/us/b\.jsonl changed while batch 0 of events read it"):
            ingest(ready)
    assert sparkless.run(ready, "events", 0).offered == 2  # the object is gone, or has one record
    assert reconcile(ready, None).differences == []


def test_a_store_that_goes_away_rejects_nothing(ready: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    put(ready, "events/us/a.jsonl", lake.lines([lake.event("e1")]))
    refresh_landing(ready)
    with monkeypatch.context() as patched:
        patched.setattr(object_store, "RETRY_SECONDS", 0.2)
        patched.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(StoreError):
            sparkless.ingest(ready, "events")
    assert sparkless.run(ready, "events", 0).accepted == 1


def test_a_released_object_is_read_under_its_second_name(ready: Settings) -> None:
    flood = ready.model_copy(update={"max_rejects_per_file": 3})
    put(ready, "events/us/a.jsonl", b"x\n" * 10)
    assert ingest(flood)["rejected"] == 1
    name = release_file(ready, "events/us/a.jsonl", reason="tested", released_by="me")
    assert ingest(ready)["rejected"] == 10
    assert open_place(ready.landing_uri).find(name) is not None


@pytest.mark.services
def test_killed_between_batches_by_a_program_with_spark(home: Settings, tmp_path: Path) -> None:
    truth = json.loads(simulate(tmp_path / "made", 8_000, seed=5, lines_per_file=1_000).as_json())
    land_folder(tmp_path / "made", home.landing_uri)
    variables = store_variables(home) | {"ADTALLY_MAX_FILES_PER_BATCH": "3"}

    def run(**more: str) -> int:
        command = [*PROGRAM, "ingest", "--json", "--no-settle"]
        return subprocess.run(command, cwd=ROOT, env=environment(**variables, **more), timeout=300, check=False).returncode

    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    assert run(**aws, **{CRASH_VARIABLE: f"before:{Step.COMMITS}:0"}) == -signal.SIGKILL
    shutil.rmtree(home.landing_path)
    assert run(**aws) == 0
    assert_truth(home, truth)
    assert reconcile(home, None).differences == []
