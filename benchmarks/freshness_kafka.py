"""How long an event takes from a topic to where it is read: the increments in Delta, Pinot, the marts.

A group of events is handed to the producer twice a second; its clock starts just before. followers.py says when it is *in Delta*
and *in the marts*. It is *in Pinot* when a query's sum over its placement adds up to its events.
All of it runs at once on this machine, broker, Pinot and builds of the marts included.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.contestants import Job, adtally_command, adtally_environment
from benchmarks.followers import COUNTS, POLL_SECONDS, IncrementReader, MartFollower
from benchmarks.kafka_topics import SteadyFeed, broker, kafka_toml
from benchmarks.make_input import World
from benchmarks.measure import BenchmarkError, TreeSampler, end_tree, note, tail
from services.launcher.errors import ServiceError
from services.launcher.pinot import PinotClient
from services.launcher.trial import throwaway_pinot
from services.serving.setup import ensure_tables, examine
from services.serving.tables import METRICS_TABLE, Source, table_specs
from spark_jobs.config import load_settings
from spark_jobs.java import require_java

INTERVAL_SECONDS = 0.5
STAGES = ("delta", "pinot", "marts")
_PATIENCE_SECONDS = 300.0
_START_SECONDS = 600.0  # until the first group has come all the way: the JVMs' start, the first batch, the first build of all marts
_TOPIC = "ad-events"


class PinotFollower(threading.Thread):
    """Asks Pinot ten times a second; ``at`` says when the sum over a group's placement had come to its events."""

    def __init__(self, client: PinotClient, feed: SteadyFeed) -> None:
        super().__init__(daemon=True)
        self.at: dict[str, float] = {}
        self.queries = 0
        self.failed_queries = 0
        self._client, self._feed = client, feed
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            waiting = sorted(set(self._feed.sent_at) - set(self.at))
            if not waiting:
                continue
            counted = " + ".join(f"sum({name})" for name in COUNTS)
            where = f"placement >= '{waiting[0]}' and placement <= '{waiting[-1]}'"
            sql = f"select placement, {counted} from {METRICS_TABLE} where {where} group by placement limit 100000"
            self.queries += 1
            try:
                rows = self._client.query(sql)
            except ServiceError:
                self.failed_queries += 1
                continue
            now = time.monotonic()
            for placement, count in rows:
                if count >= self._feed.size:
                    self.at.setdefault(str(placement), now)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def run_kafka_freshness(
    work: Path,
    *,
    rate: float,
    seconds: float,
    warm_up: float,
    to: str,
    trigger: str | None,
    adtally_env: dict[str, str],
    seed: int = 7,
    keep: bool = False,
) -> dict[str, Any]:
    """Feed a topic at ``rate`` events a second and follow the groups as far as ``to``, one of STAGES; the warm-up does not count.

    The warm-up begins when the first group has come all the way. ``to`` delta leaves out Pinot and the marts, ``pinot`` the marts.
    What was not there five minutes after the end is ``missing``.
    """
    root = work / "runs" / "freshness-kafka"
    shutil.rmtree(root, ignore_errors=True)
    wanted = STAGES[: STAGES.index(to) + 1]
    job = Job(root / "landing", root / "home", work, 8, adtally_env)
    (job.landing / "campaigns").mkdir(parents=True)
    (job.landing / "campaigns" / "campaigns.csv").write_text(World(seed).campaigns_csv())
    logs = work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as ends:
        kafka = ends.enter_context(broker(work / "brokers", partitions=2))
        client = None
        if "pinot" in wanted:
            cache = load_settings().jar_cache_path
            pinot = ends.enter_context(
                throwaway_pinot(jar_cache=cache, java=lambda: require_java().executable, parent=work / "brokers")
            )
            client = pinot.client
            ensure_tables(client, table_specs(examine(Source(kafka.bootstrap_servers))), lambda _line: None)
        job.home.mkdir(parents=True)
        env = adtally_environment(job)
        publish = "eu" if client else None
        toml = kafka_toml(root / "kafka.toml", {"eu": kafka.bootstrap_servers}, max_offsets=1_000_000, publish=publish)
        env["ADTALLY_KAFKA"] = str(toml)
        log = logs / "freshness-kafka.log"
        output = ends.enter_context((logs / "freshness-kafka.jsonl").open("w"))
        command = adtally_command("--continuous", *(["--trigger", trigger] if trigger else []))
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=ends.enter_context(log.open("w")), text=True, start_new_session=True
        )
        ends.callback(end_tree, process)
        sampler = TreeSampler(process.pid)
        sampler.start()
        ends.callback(sampler.stop)
        feed = SteadyFeed(kafka.bootstrap_servers, _TOPIC, rate=rate, interval=INTERVAL_SECONDS, seed=seed, region="eu")
        delta = IncrementReader(job.home / "lakehouse", feed.size)
        followers: list[IncrementReader | PinotFollower] = [delta]
        in_pinot = PinotFollower(client, feed) if client else None
        if in_pinot:
            followers.append(in_pinot)
        for follower in followers:
            follower.start()
            ends.callback(follower.stop)
        marts = None
        if "marts" in wanted:
            marts = MartFollower(env, logs / "freshness-marts.log")
            marts.start()
            ends.callback(marts.stop)
        note(f"freshness: {rate:.0f} events/s for {warm_up + seconds:.0f} s, as far as {to}")
        feed.start()
        ends.callback(feed._ended.set)

        def there(group: str) -> dict[str, float | None]:
            at: dict[str, float | None] = {"delta": delta.readable_at.get(group)}
            if in_pinot:
                at["pinot"] = in_pinot.at.get(group)
            if marts:
                at["marts"] = marts.published_at(delta.ledger_version(group))
            return at

        first = time.monotonic()
        end = first + _START_SECONDS
        while time.monotonic() < end and (not feed.sent_at or None in there(min(feed.sent_at)).values()):
            _require(process, log, delta)
            time.sleep(0.5)
        started = time.monotonic()
        while time.monotonic() - started < warm_up + seconds:
            _require(process, log, delta)
            time.sleep(0.5)
        feed.stop()
        groups = dict(feed.sent_at)
        behind = first + len(groups) * feed.size / rate

        end = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < end and any(None in there(group).values() for group in groups):
            _require(process, log, delta)
            time.sleep(0.5)
        counted = {group: at for group, at in groups.items() if at - started >= warm_up}
        found = {group: there(group) for group in counted}
        process.send_signal(signal.SIGTERM)
        try:
            status: int | None = process.wait(60)
        except subprocess.TimeoutExpired:
            status = None
    wrong = [] if status == 0 else [f"SIGTERM led to exit status {status}: {tail(log)}"]
    stages: dict[str, dict[str, float | int]] = {}
    for stage in wanted:
        lags = [at - counted[group] for group in counted if (at := found[group][stage]) is not None]
        if not lags:
            raise BenchmarkError(f"no group came as far as {stage}; log of the ingest: {log}\n{tail(log)}")
        missing = len(counted) - len(lags)
        stages[stage] = {
            **{f"p{round(share * 100)}_seconds": round(quantile(lags, share), 3) for share in (0.5, 0.95, 0.99)},
            "max_seconds": round(max(lags), 3),
            "missing_groups": missing,
        }
        if missing:
            wrong.append(f"{missing} groups did not come as far as {stage}")
    result: dict[str, Any] = {
        "rate": rate,
        "groups": len(counted),
        "first_group_seconds": round(started - first, 1),
        "events": len(counted) * feed.size,
        "stages": stages,
        "feed_behind_seconds": round(max(0.0, max(groups.values()) - behind), 2),
        "peak_pss_bytes": max((sample.pss for sample in sampler.samples), default=0),
        "cpu_seconds": round(sampler.cpu_seconds, 1),
        "wrong": wrong,
    }
    if in_pinot:
        result |= {"pinot_queries": in_pinot.queries, "pinot_failed_queries": in_pinot.failed_queries}
    if marts:
        result |= {"mart_builds": len(marts.builds), "mart_build_seconds": [round(b["seconds"], 1) for b in marts.builds]}
    if not keep:
        shutil.rmtree(root, ignore_errors=True)
    return result


def _require(process: subprocess.Popen[str], log: Path, delta: IncrementReader) -> None:
    """Raises BenchmarkError where the ingest or the reader of the Delta log is gone."""
    if process.poll() is not None:
        raise BenchmarkError(f"continuous mode ended by itself with status {process.poll()}; its log: {log}\n{tail(log)}")
    if delta.failure is not None:
        raise BenchmarkError(f"the Delta log could not be followed: {delta.failure}")


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
