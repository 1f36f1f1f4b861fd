"""Publishing into a real Kafka: what is sent, each version once, whatever is killed, gone or made anew."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient
from deltalake import DeltaTable

from services.launcher.kafka import Kafka
from spark_jobs.attribution.job import attribute
from spark_jobs.attribution.rules import MODELS
from spark_jobs.config import Settings, load_settings
from spark_jobs.erasure.job import erase, prove
from spark_jobs.errors import AdtallyError, BusyError, PublicationError
from spark_jobs.ingest.kafka.config import read_kafka
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.rewrite import rearrange
from spark_jobs.lake.tables import MINUTE_METRICS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.operate.vacuum import vacuum
from spark_jobs.publish import outlet
from spark_jobs.publish.job import PublishLoop, ask_publications, publish_new
from spark_jobs.publish.outlet import CONTROL_TOPIC, Outlet
from spark_jobs.publish.progress import TopicStatus, read_publications
from spark_jobs.steps import CRASH_VARIABLE, Step
from tests.spark_jobs.homes.attribution_lake import add_events, add_orders, event, mark, order
from tests.spark_jobs.publish.published import NOON, add, consume, correct, publishing, row, state, told

pytestmark = pytest.mark.homes

ROOT = Path(__file__).resolve().parents[3]
# what a killed process runs: transactions of ten messages, so that a version takes several
PUBLISH = (
    "from spark_jobs.publish import outlet; outlet.MESSAGES_A_TRANSACTION = 10\n"
    "from spark_jobs.config import load_settings; from spark_jobs.publish.job import publish_new\n"
    "publish_new(load_settings())"
)


def milliseconds(moment: Any) -> int:
    return int(moment.timestamp() * 1000)


def expected(number: int, settings: Settings, version: int, **changes: Any) -> bytes:
    """The message of row ``number``, as docs/publishing.md says, written down apart from the code."""
    held = row(number, **changes)
    commit = DeltaLog(settings.table_uri("minute_metrics")).commit(version)
    assert commit is not None
    same = {name: value for name, value in held.items() if not name.startswith("_")}
    object_ = {
        **same,
        "event_minute": milliseconds(held["event_minute"]),
        "event_date": held["event_date"].isoformat(),
        "query_id": held["_query_id"],
        "batch_id": held["_batch_id"],
        "run_id": None,
        "version": version,
        "committed_at": commit.info["timestamp"],
    }
    return json.dumps(object_, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def test_each_version_is_published_once_and_a_compaction_is_none(settings: Settings, kafka: Kafka) -> None:
    metrics, _ = publishing(settings, kafka)
    add(settings, *range(40))
    add(settings, *range(40, 45))
    done = publish_new(settings)
    assert (done.topics[0].topic, done.topics[0].versions, done.topics[0].records) == (metrics, 2, 45)
    wanted = {row(n)["record_uuid"]: expected(n, settings, 1 if n < 40 else 2) for n in range(45)}
    sent = consume(kafka, metrics)
    assert len(sent) == 45
    assert dict(sent) == wanted, "to the byte"
    tables = Lake(settings)
    newest = tables.version(MINUTE_METRICS) or 0
    assert rearrange(tables, MINUTE_METRICS, newest, (("event_date", "2025-06-30"),), 10**8, "run")
    assert publish_new(settings).topics[0].records == 0
    add(settings, 99)
    assert publish_new(settings).topics[0].records == 1
    assert len(consume(kafka, metrics)) == 46
    for found in (read_publications(settings)[0], ask_publications(settings)[0]):
        assert found == TopicStatus("minute_metrics", metrics, "here", 4, 4, 0, 0.0, 46)
    add(settings, 100)
    behind = ask_publications(settings)[0]
    assert (behind.version, behind.versions_behind) == (4, 1)
    assert 0 < behind.seconds_behind < 60


def test_what_a_correction_takes_out_is_taken_back(settings: Settings, kafka: Kafka) -> None:
    metrics, _ = publishing(settings, kafka)
    add(settings, *range(10))
    add(settings, 3, impressions=900)  # stands twice, with two values
    add(settings, 5)  # stands twice
    publish_new(settings)
    correct(settings, [row(3, impressions=900), row(4), row(5), row(6)], [row(6, clicks=8), row(50)])
    assert publish_new(settings).topics[0].records == 5
    held = state(told(kafka, metrics))
    version = 4
    zero = dict.fromkeys(
        ("impressions", "clicks", "invalid_impressions", "invalid_clicks", "spend_nanos", "invalid_spend_nanos"), 0
    )
    wanted = {
        **{row(n)["record_uuid"]: expected(n, settings, 1) for n in (0, 1, 2, 7, 8, 9)},
        row(3)["record_uuid"]: expected(3, settings, version),
        row(4)["record_uuid"]: expected(4, settings, version, **zero),
        row(5)["record_uuid"]: expected(5, settings, version),
        row(6)["record_uuid"]: expected(6, settings, version, clicks=8),
        row(50)["record_uuid"]: expected(50, settings, version),
    }
    assert {
        name: json.dumps(each, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() for name, each in held.items()
    } == wanted


def test_killed_at_every_step_each_message_is_committed_once(settings: Settings, kafka: Kafka) -> None:
    metrics, _ = publishing(settings, kafka)
    points = [(moment, step) for step in (Step.PUBLISHED_METRICS, Step.PUBLICATIONS) for moment in ("before", "after")]
    rows: list[int] = []
    for number, (moment, step) in enumerate(points):
        rows += range(25 * number, 25 * number + 25)
        add(settings, *rows[-25:])
        assert run(settings, f"{moment}:{step}:{number + 1}") == -signal.SIGKILL, f"{moment} {step} was not reached"
    publish_new(settings)
    assert publish_new(settings).topics[0].records == 0
    committed, all_ = consume(kafka, metrics), consume(kafka, metrics, "read_uncommitted")
    assert Counter(committed) == Counter((row(n)["record_uuid"], expected(n, settings, n // 25 + 1)) for n in rows), (
        "each once, whole, and the same bytes"
    )
    assert len(all_) > len(committed), "a kill left messages that were never committed"
    assert set(all_) == set(committed), "and they were sent again as they were"
    notes = [json.loads(value) for _, value in consume(kafka, CONTROL_TOPIC)]
    notes = [note for note in notes if note["topic"] == metrics]
    assert [note["total_records"] for note in notes][:6] == [10, 20, 25, 35, 45, 50]
    assert read_publications(settings)[0].total_records == 100
    # `publications` has all versions without a hole, though the process was killed before it told of one
    held = DeltaTable(settings.table_uri("publications")).to_pyarrow_table().to_pylist()
    own = sorted((each for each in held if each["topic"] == metrics), key=lambda each: int(each["version"]))
    assert own[-1]["version"] == 4


def run(settings: Settings, crash_at: str = "") -> int:
    environment = {**os.environ, "ADTALLY_HOME": str(settings.home_path), "PYTHONPATH": str(ROOT), CRASH_VARIABLE: crash_at}
    return subprocess.run([sys.executable, "-c", PUBLISH], env=environment, cwd=ROOT, timeout=120, check=False).returncode


def test_versions_that_are_gone_and_a_topic_that_is_gone(settings: Settings, kafka: Kafka) -> None:
    metrics, _ = publishing(settings, kafka)
    add(settings, 1)
    publish_new(settings)
    first = consume(kafka, metrics)
    add(settings, 2)
    commit = DeltaLog(settings.table_uri("minute_metrics")).commit(2)
    assert commit is not None
    tables = Lake(settings)
    newest = tables.version(MINUTE_METRICS) or 0
    rearrange(tables, MINUTE_METRICS, newest, (("event_date", "2025-06-30"),), 10**8, "run")
    kept = {each.table: each.reasons for each in vacuum(settings, dry_run=True).tables}
    assert kept["minute_metrics"] == {2: "files of it are still to be published"}
    (
        Path(tables.uri(MINUTE_METRICS)) / commit.added[0]["path"]
    ).unlink()  # as another vacuum may, which does not know of publishing
    with pytest.raises(PublicationError, match=r"version 2 of minute_metrics .*adtally publish --whole"):
        publish_new(settings)
    assert consume(kafka, metrics) == first, "nothing of a version that cannot be read"
    assert publish_new(settings, whole=True).topics[0].records == 2
    assert not any(each.reasons for each in vacuum(settings, dry_run=True).tables)
    assert {name: each["impressions"] for name, each in state(told(kafka, metrics)).items()} == {
        row(n)["record_uuid"]: n for n in (1, 2)
    }
    add(settings, 3)
    log = Path(tables.uri(MINUTE_METRICS)) / "_delta_log"
    (log / f"{4:020d}.json").rename(log / "kept")
    (log / f"{5:020d}.json").write_text("{}")
    with pytest.raises(PublicationError, match="version 4 of minute_metrics is to be published next"):
        publish_new(settings)
    (log / f"{5:020d}.json").unlink()
    (log / "kept").rename(log / f"{4:020d}.json")
    assert publish_new(settings).topics[0].records == 1
    # an older copy of the table put back: what was published is not of it, also when it has gone on since
    for version in (3, 4):
        (log / f"{version:020d}.json").unlink()
    for _ in range(3):
        with pytest.raises(PublicationError, match="is not what it was when version 4 of it was published"):
            publish_new(settings)
        add(settings, 7)


def test_a_lakehouse_made_anew_is_another_one(settings: Settings, kafka: Kafka) -> None:
    metrics, _ = publishing(settings, kafka)
    add(settings, 1)
    publish_new(settings)
    before = Lake(settings).table_id(MINUTE_METRICS)
    shutil.rmtree(settings.lakehouse_uri)
    ensure_tables(settings)
    add(settings, 2)
    assert ask_publications(settings)[0].version is None
    assert read_publications(settings)[0].version is None
    with pytest.raises(PublicationError, match=f"another table minute_metrics published .{before}"):
        publish_new(settings)
    assert len(consume(kafka, metrics)) == 1
    assert publish_new(settings, adopt=True).topics[0].records == 1
    add(settings, 3)
    assert publish_new(settings).topics[0].records == 1, "asked for once"


def test_the_notes_lost_all_is_sent_again_as_it_was(settings: Settings, kafka: Kafka) -> None:
    metrics, _ = publishing(settings, kafka)
    add(settings, *range(5))
    publish_new(settings)
    sent = consume(kafka, metrics)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    admin.delete_topics([CONTROL_TOPIC])[CONTROL_TOPIC].result(30)
    time.sleep(1)
    assert publish_new(settings).topics[0].records == 5
    assert Counter(consume(kafka, metrics)) == Counter([*sent, *sent])


def test_one_publisher_and_what_it_does_while_an_ingest_commits(settings: Settings, kafka: Kafka) -> None:
    metrics, _ = publishing(settings, kafka)
    lags: list[float] = []
    stop = threading.Event()
    failed: list[Exception] = []
    loop = PublishLoop(settings, progress=lambda done: lags.append(done.lag_seconds))

    def follow() -> None:
        try:
            loop.run(stop)
        except Exception as error:
            failed.append(error)

    running = threading.Thread(target=follow)
    running.start()
    try:
        for number in range(10):
            add(settings, *range(100 * number, 100 * number + 100))
            time.sleep(0.1)
        end = time.monotonic() + 30
        while len(lags) < 10 and time.monotonic() < end:
            time.sleep(0.05)
        with pytest.raises(BusyError, match="another process publishes"):
            publish_new(settings)
        add(settings, 5_000)
        stop.set()
        running.join(60)
        assert not failed
        assert len(consume(kafka, metrics)) == 1_001, "what was committed before the end too"
    finally:
        stop.set()
        running.join(60)
    assert lags[-2] < 5, "seconds; far below one on an idle machine"


def test_a_broker_that_is_away_is_told_once_and_one_topic_stops_no_other(settings: Settings, kafka: Kafka) -> None:
    metrics, credits = publishing(settings, kafka)
    where = settings.kafka_path.read_text()
    add(settings, 1)
    add_events(settings, [event("e1", 3)])
    add_orders(settings, [order("o")])
    attribute(settings)
    attributed = Path(settings.table_uri("attributed_orders"))
    for file in attributed.glob("*.parquet"):
        file.unlink()
    said: list[str] = []
    settings.kafka_path.write_text(where.replace(kafka.bootstrap_servers, "127.0.0.1:1"))
    away = PublishLoop(settings, problem=said.append)
    settings.kafka_path.write_text(where)
    stop = threading.Event()
    outlet_seconds, outlet._ANSWER_SECONDS = outlet._ANSWER_SECONDS, 0.3
    try:
        running = threading.Thread(target=away.run, args=(stop,))
        running.start()
        end = time.monotonic() + 60
        while len(said) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(1.5)  # further attempts are not told
        stop.set()
        running.join(60)
    finally:
        stop.set()
        outlet._ANSWER_SECONDS = outlet_seconds
    assert sorted(each.split(":")[0] for each in said) == sorted((metrics, credits))
    assert all("Kafka: " in each for each in said)
    said.clear()
    there, stop = PublishLoop(settings, problem=said.append), threading.Event()
    failed: list[Exception] = []

    def follow() -> None:
        try:
            there.run(stop)
        except PublicationError as error:
            failed.append(error)

    running = threading.Thread(target=follow)
    running.start()
    end = time.monotonic() + 60
    while not said and time.monotonic() < end:
        time.sleep(0.05)
    add(settings, 2)
    stop.set()
    running.join(60)
    assert [str(error) for error in failed] == [said[0].partition(": ")[2]]
    assert "cannot be published" in said[0]
    assert len(consume(kafka, metrics)) == 2


def test_who_is_shut_out_publishes_nothing_more(settings: Settings, kafka: Kafka) -> None:
    metrics, _ = publishing(settings, kafka)
    publish = read_kafka(settings).publish
    assert publish is not None
    identity = Lake(settings).table_id(MINUTE_METRICS) or ""
    names = (publish.cluster, MINUTE_METRICS.name, identity, metrics, Step.PUBLISHED_METRICS)
    with Outlet(*names) as old:
        old.publish(1, iter([(["a"], ["1"])]))
        with Outlet(*names) as new:
            assert new.position == old.position
            new.publish(2, iter([(["b"], ["2"])]))
            with pytest.raises(BusyError, match="another publisher"):
                old.publish(2, iter([(["b"], ["2"])]))
    assert sorted(consume(kafka, metrics)) == [("a", b"1"), ("b", b"2")]


def test_shut_out_once_a_loop_goes_on_and_twice_it_ends(settings: Settings, kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, _ = publishing(settings, kafka)
    monkeypatch.setattr("spark_jobs.publish.job._FENCED_PAUSE", 0.1)
    publish = read_kafka(settings).publish
    assert publish is not None
    identity = Lake(settings).table_id(MINUTE_METRICS) or ""
    said: list[str] = []
    sent: list[int] = []
    stop = threading.Event()
    loop = PublishLoop(settings, problem=said.append, progress=lambda done: sent.append(done.version))
    failed: list[Exception] = []

    def follow() -> None:
        try:
            loop.run(stop)
        except BusyError as error:
            failed.append(error)

    def wait(is_done: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not is_done() and time.monotonic() < end:
            time.sleep(0.02)
        assert is_done(), (said, sent)

    running = threading.Thread(target=follow)
    running.start()
    try:
        add(settings, 1)
        wait(lambda: sent == [1])
        for number, told_of in ((2, 2), (3, 3)):  # the second time there is one line, and no "" behind it
            with Outlet(publish.cluster, MINUTE_METRICS.name, identity, metrics, Step.PUBLISHED_METRICS):
                add(settings, number)
                wait(lambda told_of=told_of: len(said) == told_of and sent == [1, 2])  # type: ignore[misc]
    finally:
        stop.set()
        running.join(60)
    assert sent == [1, 2]
    assert [bool(line) for line in said] == [True, False, True]
    assert len(failed) == 1
    assert publish_new(settings).topics[0].records == 1
    assert len(consume(kafka, metrics)) == 3


def uuid_of(order_id: str, touch: str | None) -> str:
    text = "\x1f".join("-" if part is None else f"{len(part)}:{part}" for part in (order_id, touch))
    return str(uuid.UUID(hashlib.md5(text.encode()).hexdigest()))


def test_credits_and_the_touches_that_an_order_loses(settings: Settings, kafka: Kafka) -> None:
    _, credits = publishing(settings, kafka)
    add_events(settings, [event("e1", 30), event("e2", 2), event("x", 5, user_id="v")])
    add_orders(settings, [order("o"), order("p", user_id="nobody"), order("q", user_id="v")])
    attribute(settings)
    assert publish_new(settings).topics[1].records == 4
    sent = told(kafka, credits)
    assert {(each["order_id"], each["touch_event_id"], each["record_uuid"]) for each in sent} == {
        (o, t, uuid_of(o, t)) for o, t in (("o", "e1"), ("o", "e2"), ("p", None), ("q", "x"))
    }
    first = next(each for each in sent if each["touch_event_id"] == "e1")
    order_time = milliseconds(NOON)
    fields = {"version": 1, "is_current": 1, "status": "placed", "touches": 2, "total_micros": 1000, "campaign_id": "c"}
    fields |= {"order_time": order_time, "touch_time": order_time - 30 * 3_600_000, "delta_version": 1}
    fields |= {"first_click_7d_micros": 1000, "linear_30d_micros": 500, "last_click_7d_micros": 0, "linear_1d_micros": None}
    assert first == first | fields
    assert all(f"{model}_{days}d_micros" in each for each in sent for model in MODELS for days in (1, 7, 14, 28, 30))
    add_orders(settings, [order("q", user_id="v", status="cancelled")])
    mark(settings, "e1")
    attribute(settings)
    assert publish_new(settings).topics[1].records == 4
    held = state(told(kafka, credits))
    by_touch = {(each["order_id"], each["touch_event_id"]): each for each in held.values()}
    assert {key: (each["version"], each["is_current"], each["last_click_30d_micros"]) for key, each in by_touch.items()} == {
        ("o", "e1"): (2, 0, 0),
        ("o", "e2"): (2, 1, 1000),
        ("p", None): (1, 1, None),
        ("q", "x"): (2, 0, 0),
        ("q", None): (2, 1, None),
    }
    gone = by_touch["o", "e1"]
    assert (gone["touch_time"], gone["campaign_id"], gone["reason"]) == (first["touch_time"], "c", "touch_invalid")
    # all of it as it stands: the same state
    assert publish_new(settings, whole=True).topics[1].records == 5
    again = state(told(kafka, credits))
    assert {name: each | {"delta_version": 0} for name, each in again.items()} == {
        name: each | {"delta_version": 0} for name, each in held.items()
    }


def test_rows_of_orders_that_are_changed_in_place_or_taken_out(settings: Settings, kafka: Kafka) -> None:
    _, credits = publishing(settings, kafka)
    add_events(settings, [event("e1", 30), event("e2", 2)])
    add_orders(settings, [order("o"), order("p", user_id="nobody")])
    attribute(settings)
    mark(settings, "e1")
    attribute(settings)
    publish_new(settings)
    before = state(told(kafka, credits))
    attributed = DeltaTable(settings.table_uri("attributed_orders"))
    attributed.update(predicate="user_id = 'u'", updates={"user_id": "'erased'"})
    assert publish_new(settings).topics[1].records == 1, "only the latest revision's"
    held = state(told(kafka, credits))
    assert held == before | {
        uuid_of("o", "e2"): before[uuid_of("o", "e2")] | {"user_id": "erased", "delta_version": attributed.version()}
    }
    attributed.delete("order_id = 'o'")
    assert publish_new(settings).topics[1].records == 1
    gone = state(told(kafka, credits))[uuid_of("o", "e2")]
    assert (gone["is_current"], gone["last_click_30d_micros"], gone["version"]) == (0, 0, 2)


def test_nothing_to_publish_where_nobody_says_where(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path)
    assert publish_new(settings).topics == []
    assert read_publications(settings) == []
    assert outlet.MESSAGES_A_TRANSACTION == 100_000


def test_credits_of_an_erased_person_are_published_again_under_the_same_keys(settings: Settings, kafka: Kafka) -> None:
    _, credits = publishing(settings, kafka)
    person = "user-anna-0001"
    add_events(settings, [event("e1", 30, user_id=person), event("e2", 2, user_id=person), event("e3", 2, user_id="other")])
    add_orders(settings, [order("o", user_id=person), order("p", user_id="other")])
    attribute(settings)
    with pytest.raises(AdtallyError, match="wait to be published"):
        erase(settings, [person])
    publish_new(settings)
    mark(settings, "e1")
    attribute(settings)
    publish_new(settings)
    before = state(told(kafka, credits))
    (run,) = erase(settings, [person])
    prove(settings, run)
    assert publish_new(settings).topics[1].records == 2
    held = state(told(kafka, credits))
    assert held.keys() == before.keys()
    assert person not in repr(held)
    assert {key: each | {"user_id": "", "delta_version": 0} for key, each in held.items()} == {
        key: each | {"user_id": "", "delta_version": 0} for key, each in before.items()
    }
    assert {each["user_id"] for each in held.values()} == {run.tokens[person], "other"}
