"""Two regions, each with a broker of its own, both active: one is lost and comes back, and the totals are exact.

Everything is mirrored to the other region, some of it twice, and the clocks are a minute apart. One broker is killed while it is
read, and comes back with its backlog. In the end one region is read from the start again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import correct
import pytest

from services.launcher.kafka import Kafka
from services.launcher.trial import throwaway_kafka
from services.simulator.kafka import Cluster, Sending, simulate_to_kafka
from services.simulator.truth import Truth
from spark_jobs.config import Settings, load_settings
from spark_jobs.java import require_java
from spark_jobs.operate.watermark import close_by_hand, read_closing

pytestmark = [pytest.mark.services, pytest.mark.trial, pytest.mark.timeout(1800)]

EVENTS = 1_000
WEST, EAST = "eu-west", "us-east"
TOPICS = ("ad-events", "orders")
COUNTED = ("offered", "accepted", "duplicate", "conflict", "rejected")
SECONDS = 600.0  # the wall clock of a busy machine says nothing


@contextmanager
def two_regions() -> Iterator[dict[str, Kafka]]:
    def region() -> Any:
        cache = load_settings().jar_cache_path
        return throwaway_kafka(jar_cache=cache, java=lambda: require_java().executable, topics=TOPICS, heap="256m")

    with region() as west, region() as east:
        yield {WEST: west, EAST: east}


@contextmanager
def ingest(settings: Settings, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The continuous ingest, told to end at the end; it must do so with status 0."""
    command = [sys.executable, "-m", "spark_jobs", "ingest", "--continuous", "--trigger", "1"]
    env = os.environ | {"ADTALLY_HOME": str(settings.home_path), "ADTALLY_SHUFFLE_PARTITIONS": "2"}
    with log.open("ab") as sink:
        process = subprocess.Popen(command, env=env, stdout=sink, stderr=sink)
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0, log.read_text()[-3_000:]
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def until(done: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, what: str) -> None:
    end = time.monotonic() + SECONDS
    while not done():
        assert process.poll() is None, f"the ingest ended before {what}: {log.read_text()[-3_000:]}"
        assert time.monotonic() < end, f"{what}: not within {SECONDS:.0f} s: {log.read_text()[-3_000:]}"
        time.sleep(0.2)


def offered(settings: Settings, stream: str = "events") -> Counter[str]:
    """Records that the ledger has, by cluster."""
    sql = f"select region, sum(offered)::bigint from batch_ledger where stream = '{stream}' and source = 'kafka' group by region"
    return Counter(dict(correct.rows(settings, sql)))


def totals_of(settings: Settings) -> dict[str, Any]:
    """What the tables hold, without the identity of batches and of the cluster that came first; and without duplicates."""
    hour = "strftime(event_hour, '%Y-%m-%dT%H:00:00Z')"
    minute_hour = "strftime(event_minute, '%Y-%m-%dT%H:00:00Z')"
    measures = ("impressions", "clicks", "spend_nanos")
    gross = ", ".join(f"sum({name} + invalid_{name})::bigint" for name in measures)
    return {
        "campaign_hours": correct.rows(
            settings, f"select campaign_id, region, {minute_hour}, currency, {gross} from minute_metrics group by all"
        ),
        "orders": correct.rows(settings, "select currency, status, sum(total_micros)::bigint from orders group by all"),
        "accepted": correct.rows(
            settings,
            f"select {hour}, sum(accepted)::bigint from batch_ledger where stream = 'events' group by 1 having sum(accepted) > 0",
        ),
        "events": correct.rows(settings, "select count(*), count(distinct event_id) from events"),
        "record_uuids": correct.rows(settings, "select count(*) - count(distinct record_uuid) from minute_metrics"),
        "order_records": correct.rows(settings, "select sum(accepted)::bigint from batch_ledger where stream = 'orders'"),
    }


def truth_of(truth: Truth) -> dict[str, Any]:
    """The same by the truth."""
    measures = ("impressions", "clicks", "spend_nanos")
    keys = ("campaign_id", "region", "event_hour", "currency")
    by_hour: Counter[str] = Counter()
    for row in truth.accounting:
        by_hour[row["event_hour"]] += row["accepted"]
    return {
        "campaign_hours": sorted(
            (
                (*(row[key] for key in keys), *(row[name] + row[f"invalid_{name}"] for name in measures))
                for row in truth.campaign_hours
            ),
            key=repr,
        ),
        "orders": sorted(
            (
                (currency, status, micros)
                for currency, sums in truth.orders["total_micros_by_currency_and_status"].items()
                for status, micros in sums.items()
                if micros
            ),
            key=repr,
        ),
        "accepted": sorted(((hour, count) for hour, count in by_hour.items() if count), key=repr),
        "events": [(truth.totals["accepted"], truth.totals["accepted"])],
        "record_uuids": [(0,)],
        "order_records": [(sum(row["accepted"] for row in truth.orders["accounting"]),)],
    }


def test_one_region_lost_and_back_mirrored_twice_clocks_apart_and_read_again(settings: Settings, tmp_path: Path) -> None:
    log = tmp_path / "ingest.log"
    with two_regions() as brokers:
        clusters = [Cluster(name, {"bootstrap.servers": kafka.bootstrap_servers}) for name, kafka in brokers.items()]
        sending = Sending(transactional=True, abort_some=0.2, chunk=1_000, mirror=1.0, mirror_again=0.3, clocks_ahead={EAST: 60.0})
        truth = simulate_to_kafka(
            settings.landing_path, EVENTS, 17, clusters, sending, days=0.5, campaigns=12, ads=60, click_rate=0.2, conversion=0.4
        )
        (settings.home_path / "kafka.toml").write_text(
            "\n".join(
                f'[[clusters]]\nname = "{one.name}"\nbootstrap_servers = "{one.options["bootstrap.servers"]}"\n'
                "max_offsets_per_batch = 250\n"
                for one in clusters
            )
        )
        sent = {name: held["events"] for name, held in truth.totals["messages"].items()}
        with ingest(settings, log) as process:
            until(lambda: min(offered(settings)[WEST], offered(settings)[EAST]) > 0, process, log, "a batch of each")
            (pid,) = brokers[EAST].status().processes.values()
            os.kill(pid, signal.SIGKILL)
            until(lambda: offered(settings)[WEST] == sent[WEST], process, log, f"all of {WEST}")
            until(lambda: "are tried again every" in log.read_text(), process, log, f"word of {EAST}")
            assert 0 < offered(settings)[EAST] < sent[EAST]
            lost = read_closing(settings)
            newest = max(source.progress_at for source in lost.sources if source.progress_at is not None)
            behind = min(s.progress_at for s in lost.sources if s.region == EAST and s.stream == "events" and s.progress_at)
            # what the lost region may still have holds its hours open
            assert lost.closed_through is None or lost.closed_through <= behind < newest
            # an operator says that one of them is complete all the same
            decided = (lost.closed_through or behind.replace(minute=0, second=0, microsecond=0)) + timedelta(hours=1)
            by_hand = close_by_hand(settings, decided, reason="the region is away", closed_by="test", now=datetime.now(UTC))
            assert by_hand.closed_through == decided
            brokers[EAST].up()
            until(lambda: offered(settings)[EAST] == sent[EAST], process, log, f"the backlog of {EAST}")
            of_orders = {name: held["orders"] for name, held in truth.totals["messages"].items()}
            until(lambda: offered(settings, "orders") == Counter(of_orders), process, log, "the orders")
            copied = "select count(*) from (select distinct cluster, source_topic, source_partition, source_offset from raw_events)"
            until(lambda: correct.rows(settings, copied) == [(sum(sent.values()),)], process, log, "the raw copy")
        found = totals_of(settings)
        wanted = truth_of(truth)
        assert {name: found[name] for name in wanted} == wanted
        assert_books(settings, truth)
        closed = read_closing(settings).closed_through
        assert closed is not None and closed > decided

        # one region from the start: all of it comes a second time, and not one total moves
        for stream in TOPICS:
            name = f"{stream.removeprefix('ad-')}-{EAST}"
            (settings.checkpoints_path / name).rename(settings.home_path / f"lost-{name}")
        with ingest(settings, log) as process:
            until(lambda: offered(settings)[EAST] == 2 * sent[EAST], process, log, f"all of {EAST} again")
            until(lambda: offered(settings, "orders")[EAST] == 2 * of_orders[EAST], process, log, "its orders again")
        assert totals_of(settings) == found
        assert read_closing(settings).closed_through == closed


def assert_books(settings: Settings, truth: Truth) -> None:
    """The ledger against the truth: by cluster what each of them decides, by hour what both do together."""
    sums = ", ".join(f"sum({name})::bigint" for name in COUNTED)
    hour = "strftime(event_hour, '%Y-%m-%dT%H:00:00Z')"
    ledger = correct.rows(
        settings, f"select region, {hour}, {sums}, sum(late)::bigint from batch_ledger where stream = 'events' group by all"
    )
    by_cluster: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    by_hour: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    for region, at, *values, _late in ledger:
        counts = dict(zip(COUNTED, values, strict=True))
        assert counts["offered"] == sum(counts[name] for name in COUNTED[1:])
        by_hour[at].update(counts)
        by_cluster[region, at].update({name: counts[name] for name in ("offered", "conflict", "rejected")})
    expected_cluster: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    expected_hour: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    for row in truth.accounting:
        expected_hour[row["event_hour"]].update({name: row[name] for name in COUNTED})
        expected_cluster[row["region"], row["event_hour"]].update({name: row[name] for name in ("offered", "conflict", "rejected")})
    assert by_hour == expected_hour
    assert by_cluster == expected_cluster
    low, high = truth.totals["late_range"]
    assert low <= sum(row[-1] for row in ledger) <= high
