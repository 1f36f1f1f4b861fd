"""Sends the simulated traffic to Kafka topics of one or two clusters, and writes the result that an exact accounting must have.

The records are those that `simulate` writes as lines, in the order of their receipt, each with its id as key. What differs:

- A cluster, not a folder, offers a record: the accounting's region is the cluster's name. A record that goes through a cluster of
  another name names the region of its event. No folder contradicts a region, so broken records have an invalid name instead.
- Kafka keeps the order of records of one key only within a cluster. So the result for two clusters does not depend on which one is
  read first: a conflict goes through the cluster of its event, and so do the resends of an event whose clock runs ahead of its
  collector's. Accepted rows, their money and credit are exact, and so are offered, rejected and conflict of each cluster and hour.
  If an id goes through both clusters, one accepts it and the other finds a duplicate, but which one is open. This affects ``late``
  of resends that come long after: ``late_range`` in the totals has the minimum and the maximum.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Unpack

import numpy as np
import numpy.typing as npt
from confluent_kafka import KafkaError, KafkaException, Producer

from services.simulator import encode
from services.simulator.broken import EVENT_BREAKAGES, ORDER_BREAKAGES, from_topics
from services.simulator.errors import DeliveryError, SimulationError
from services.simulator.landing import campaigns_csv, write_file
from services.simulator.orders import OrderLine
from services.simulator.simulate import Encoder, Traffic, TrafficOptions, account, draw_traffic, write_beside
from services.simulator.traffic import CONFLICT
from services.simulator.truth import ACCEPTED, HOUR_US, EventLines, Ints, Limits, OrderTruth, Truth, classify, to_us
from services.simulator.world import REGIONS

Bools = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.intp]

_START = "for a trial: `adtally services kafka up` starts one with its topics"
_MIRROR_DELAY_US = 400_000
_TRANSACTION_SECONDS = 60.0
_ATTEMPTS = 5
_ANSWER_SECONDS = 15.0
_PACE_SECONDS = 0.1
_DEFAULTS = {
    "acks": "all",
    "compression.type": "lz4",
    "linger.ms": "20",
    "queue.buffering.max.messages": "200000",
    "delivery.timeout.ms": "60000",  # no longer than a transaction may take
    "log_level": "0",  # failures are raised as errors
}


@dataclass(frozen=True)
class Cluster:
    """A cluster to send to. ``name`` is the region of records that name none, ``options`` are those of librdkafka."""

    name: str
    options: Mapping[str, str] = field(repr=False)
    events_topic: str = "ad-events"
    orders_topic: str = "orders"


@dataclass(frozen=True)
class Sending:
    """How the records are sent.

    ``transactional``: a transaction for each ``chunk`` records and cluster; ``abort_some``: this share of them is sent in full,
    aborted, and sent again. ``mirror``: all records of this share of the ids also go through the other cluster, byte by byte;
    ``mirror_again``: this share of the mirrored records is sent twice. ``clocks_ahead``: seconds by which the clocks of a cluster's
    collectors are ahead (negative: behind). ``rate``: event records a second by the wall clock (None: as fast as possible).
    ``live``: the traffic begins now and each record is sent at its time, which is its ``received_at``; orders after the end are
    left out.
    """

    transactional: bool = False
    abort_some: float = 0.0
    mirror: float = 0.0
    mirror_again: float = 0.0
    clocks_ahead: Mapping[str, float] = field(default_factory=dict)
    rate: float | None = None
    live: bool = False
    chunk: int = 10_000


@dataclass(frozen=True)
class _Schedule:
    """The records in the order of sending; ``position`` is that of a line, or of an order if ``is_order``."""

    position: Numbers
    cluster: Numbers
    is_order: Bools
    is_mirrored: Bools
    at_us: Ints

    def take(self, where: Numbers | Bools) -> _Schedule:
        return _Schedule(*(column[where] for column in vars(self).values()))


def simulate_to_kafka(
    out: Path,
    events: int,
    seed: int,
    clusters: Sequence[Cluster],
    sending: Sending | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Unpack[TrafficOptions],
) -> Truth:
    """Send `events` event records (mirrored ones come on top) and their orders to the clusters; returns the truth.

    Writes the campaigns, the rules and truth.json into the folder `out`, as `simulate` does. After a kill you can send the same
    traffic again into the same folder: the records have the same ids and count once (``offered`` and ``duplicate`` are those of one
    sending). With ``live`` each traffic is different.

    ``progress`` is called with (event records sent, all). Raises SimulationError for wrong arguments and for a folder with another
    traffic, DeliveryError if a cluster does not accept a record: some records are then sent and some are not.
    """
    sending = sending or Sending()
    _check(clusters, sending, options)
    if sending.live:
        options["start"], options["rate"] = datetime.now(UTC), sending.rate
    traffic = draw_traffic(events, seed, **options, order_breakages=from_topics(ORDER_BREAKAGES))
    traffic = _for_clusters(traffic, clusters, sending)
    _refuse_another(out, traffic)
    schedule = _schedule(traffic, clusters, sending)
    traffic = _with_regions(traffic, clusters, schedule)
    if not sending.live:
        truth = _write_truth(out, traffic, clusters, sending, schedule)
    write_beside(out, traffic)
    outlets = [_Outlet(cluster, sending, seed) for cluster in clusters]
    encoder = Encoder(traffic.world, from_topics(EVENT_BREAKAGES))
    done, total = 0, int((~schedule.is_order).sum())
    try:
        for chunk in _chunks(traffic, schedule, sending):
            _send_chunk(traffic, chunk, outlets, encoder, sending)
            done += int((~chunk.is_order).sum())
            if progress is not None:
                progress(done, total)
        for outlet in outlets:
            outlet.flush()
    except KafkaException as error:
        raise DeliveryError(f"the records could not be sent: {_said(error)}") from None
    finally:
        for outlet in outlets:
            outlet.close()
    if sending.live:  # the times of receipt are known only now
        truth = _write_truth(out, traffic, clusters, sending, schedule)
    return truth


def _check(clusters: Sequence[Cluster], sending: Sending, options: TrafficOptions) -> None:
    names = [cluster.name for cluster in clusters]
    unknown = sorted(set(sending.clocks_ahead) - set(names))
    shares = {name: getattr(sending, name) for name in ("abort_some", "mirror", "mirror_again")}
    problems = {
        "one cluster is needed, or two": not 1 <= len(clusters) <= 2,
        "two clusters need two names": len(set(names)) != len(names),
        f"there is no cluster {', '.join(unknown)} whose clock could be ahead": bool(unknown),
        "a clock is ahead by a day at most": not all(abs(value) <= 86_400 for value in sending.clocks_ahead.values()),
        "a mirror needs two clusters": sending.mirror > 0 and len(clusters) < 2,
        "mirror_again needs a mirror": sending.mirror_again > 0 and not sending.mirror,
        "only transactions can be aborted": sending.abort_some > 0 and not sending.transactional,
        "live needs a rate": sending.live and sending.rate is None,
        "live traffic begins now: start, days and rate are not for it": sending.live
        and bool({"start", "days", "rate"} & set(options)),
        "rate must be more than 0": sending.rate is not None and not sending.rate > 0,
        "chunk must be at least 1": sending.chunk < 1,
        **{f"{name} lies between 0 and 1": not 0 <= share <= 1 for name, share in shares.items()},
    }
    for problem, found in problems.items():
        if found:
            raise SimulationError(problem)


def _refuse_another(out: Path, traffic: Traffic) -> None:
    """Raise SimulationError if the folder has another traffic's truth or campaigns."""
    hint = "choose another folder, or remove what is in it"
    if out.exists() and not out.is_dir():
        raise SimulationError(f"{out} is not a folder", hint=hint)
    if (out / "truth.json").exists():
        try:
            held = Truth.load(out / "truth.json")
        except (ValueError, TypeError, KeyError):
            raise SimulationError(f"{out} has a truth.json that is none of this version", hint=hint) from None
        if held.seed != traffic.seed or any(held.args.get(name) != value for name, value in traffic.args.items()):
            raise SimulationError(f"{out} has the truth of another traffic", hint=hint)
    campaigns = out / "campaigns" / "campaigns.csv"
    if campaigns.exists() and campaigns.read_bytes() != campaigns_csv(traffic.world.rows):
        raise SimulationError(f"{out} has the campaigns of another traffic", hint=hint)


def _cluster_of_region(clusters: Sequence[Cluster]) -> Numbers:
    """Return the cluster that collects each region's records: the one of its name, or the next in order."""
    names = [cluster.name for cluster in clusters]
    if set(names) == set(REGIONS):
        return np.array([names.index(region) for region in REGIONS])
    return np.arange(len(REGIONS)) % len(clusters)


def _ahead_us(clusters: Sequence[Cluster], sending: Sending) -> Ints:
    """Return by how many microseconds (whole milliseconds) the clocks of each cluster's collectors are ahead."""
    return np.array([round(sending.clocks_ahead.get(cluster.name, 0.0) * 1000) * 1000 for cluster in clusters], np.int64)


def _for_clusters(traffic: Traffic, clusters: Sequence[Cluster], sending: Sending) -> Traffic:
    """Adapt the traffic: its result does not depend on which cluster is read first, its times are those of the collectors."""
    lines, events = traffic.lines, traffic.events
    region = lines.region
    cluster_of = _cluster_of_region(clusters)
    ahead_us = _ahead_us(clusters, sending)
    if len(clusters) > 1:
        is_ahead = events.event_us > events.received_us + ahead_us[cluster_of[events.region]]
        stays = (lines.intent == CONFLICT) | is_ahead[lines.event]
        region = np.where(stays, events.region[lines.event], region)
    received_us = lines.received_us + ahead_us[cluster_of[region]]
    orders = traffic.order_lines
    if sending.live:  # does not wait for orders of hours later
        orders = [line for line in orders if line.received_us <= traffic.end_us]
    return replace(traffic, lines=replace(lines, region=region, received_us=received_us), order_lines=orders)


def _schedule(traffic: Traffic, clusters: Sequence[Cluster], sending: Sending) -> _Schedule:
    """Return own and mirrored records of all clusters in the order of their receipt, by true clocks."""
    lines, orders = traffic.lines, traffic.order_lines
    cluster_of = _cluster_of_region(clusters)
    line_cluster = cluster_of[lines.region]
    order_cluster = cluster_of[np.array([line.region for line in orders], np.intp)]
    order_us = np.array([line.received_us for line in orders], np.int64)
    own = _Schedule(
        position=np.concatenate([np.arange(len(line_cluster)), np.arange(len(orders))]),
        cluster=np.concatenate([line_cluster, order_cluster]),
        is_order=np.repeat([False, True], [len(line_cluster), len(orders)]),
        is_mirrored=np.zeros(len(line_cluster) + len(orders), np.bool_),
        at_us=np.concatenate([lines.received_us - _ahead_us(clusters, sending)[line_cluster], order_us]),
    )
    rng = np.random.default_rng([traffic.seed, 1])
    by_identity = rng.random(len(traffic.events.raw_ids))[lines.identity]
    by_order = np.array([_share_of(traffic.seed, line) for line in orders], np.float64)
    again = rng.random(len(own.position))
    mirrored = own.take(np.concatenate([by_identity, by_order]) < sending.mirror)
    mirrored = replace(
        mirrored,
        cluster=1 - mirrored.cluster,
        is_mirrored=np.ones(len(mirrored.position), np.bool_),
        at_us=mirrored.at_us + _MIRROR_DELAY_US,
    )
    twice = mirrored.take(again[: len(mirrored.position)] < sending.mirror_again)
    twice = replace(twice, at_us=twice.at_us + _MIRROR_DELAY_US)
    columns = [np.concatenate(parts) for parts in zip(*(vars(one).values() for one in (own, mirrored, twice)), strict=True)]
    everything = _Schedule(*columns)
    return everything.take(np.argsort(everything.at_us, kind="stable"))


def _share_of(seed: int, line: OrderLine) -> float:
    """Return a number in [0, 1) that is the same for all records of an order."""
    name = line.text if line.record is None else str(line.record["order_id"]).encode()
    digest = hashlib.blake2b(name, digest_size=8, salt=(seed % 2**64).to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def _with_regions(traffic: Traffic, clusters: Sequence[Cluster], schedule: _Schedule) -> Traffic:
    """Let every record name the region of its event, unless all records of the event go through the cluster of that name."""
    lines, events = traffic.lines, traffic.events
    home = events.region[lines.event]
    sent = schedule.take(~schedule.is_order)
    names = np.array([REGIONS.index(cluster.name) if cluster.name in REGIONS else -1 for cluster in clusters])
    elsewhere = names[sent.cluster] != home[sent.position]
    has_region = events.has_region.copy()
    has_region[lines.event[sent.position[elsewhere]]] = True
    return replace(traffic, lines=replace(lines, region=home), events=replace(events, has_region=has_region))


def _write_truth(out: Path, traffic: Traffic, clusters: Sequence[Cluster], sending: Sending, schedule: _Schedule) -> Truth:
    sent = schedule.take(~schedule.is_order)
    columns = traffic.lines.truth_columns(sent.position, traffic.events, traffic.world, traffic.listed)
    columns = replace(columns, source=sent.cluster)
    names = [cluster.name for cluster in clusters]
    orders = OrderTruth()
    ordered = schedule.take(schedule.is_order)
    for position, cluster in zip(ordered.position.tolist(), ordered.cluster.tolist(), strict=True):
        orders.add(names[cluster], traffic.order_lines[position].record)
    messages = {
        name: {
            "events": int((sent.cluster == code).sum()),
            "orders": int((ordered.cluster == code).sum()),
            "mirrored": int(((schedule.cluster == code) & schedule.is_mirrored).sum()),
        }
        for code, name in enumerate(names)
    }
    late_range = _late_range(columns, traffic.limits)
    args = {"clusters": names, "mirror": sending.mirror, "mirror_again": sending.mirror_again}
    args |= {"clocks_ahead": dict(sending.clocks_ahead), "live": sending.live}
    totals = {"messages": messages, "late_range": late_range}
    truth = account(traffic, columns, orders, args=args, totals=totals, sources=names)
    write_file(out / "truth.json", truth.as_json().encode())
    return truth


def _late_range(lines: EventLines, limits: Limits) -> list[int]:
    """Return the minimum and the maximum of late accepted events, over all orders in which the clusters may be read."""
    assert lines.source is not None
    grace_us = limits.hour_grace // timedelta(microseconds=1)
    late_of: dict[int, set[bool]] = {}
    payload_of: dict[int, int] = {}
    for code in np.unique(lines.source):
        at = np.flatnonzero(lines.source == code)
        mine = lines.take(at)
        taken = np.flatnonzero(classify(mine, limits.future_skew) == ACCEPTED)
        late = mine.received_us[taken] >= (mine.event_us[taken] // HOUR_US + 1) * HOUR_US + grace_us
        columns = (mine.identity[taken].tolist(), mine.payload[taken].tolist(), late.tolist())
        for identity, payload, is_late in zip(*columns, strict=True):
            late_of.setdefault(identity, set()).add(is_late)
            if payload_of.setdefault(identity, payload) != payload:
                raise AssertionError("the clusters would accept different records of one id")
    return [sum(all(found) for found in late_of.values()), sum(any(found) for found in late_of.values())]


def _chunks(traffic: Traffic, schedule: _Schedule, sending: Sending) -> Iterator[_Schedule]:
    """Yield the records in chunks; with a rate, each chunk at its time."""
    size = sending.chunk
    if sending.rate is None:
        for begin in range(0, len(schedule.position), size):
            yield schedule.take(np.arange(begin, min(begin + size, len(schedule.position))))
        return
    own = ~(schedule.is_order | schedule.is_mirrored)
    seconds = np.cumsum(own) / sending.rate
    if sending.live:  # each record at its own time; those after the end follow at the rate
        at, end_seconds = (schedule.at_us - traffic.start_us) / 1e6, (traffic.end_us - traffic.start_us) / 1e6
        after = at > end_seconds
        seconds = np.where(after, end_seconds + np.cumsum(own & after) / sending.rate, at)
    started, begin = time.monotonic(), 0
    while begin < len(seconds):
        passed = time.monotonic() - started
        end = min(int(np.searchsorted(seconds, passed, side="right")), begin + size)
        if end > begin:
            yield schedule.take(np.arange(begin, end))
            begin = end
            continue
        time.sleep(max(_PACE_SECONDS, float(seconds[begin]) - passed))


def _send_chunk(traffic: Traffic, chunk: _Schedule, outlets: Sequence[_Outlet], encoder: Encoder, sending: Sending) -> None:
    """Send one chunk. With ``live`` writes the times of receipt into the traffic's lines."""
    lines, events = traffic.lines, traffic.events
    of_events = chunk.take(~chunk.is_order)
    if sending.live:
        now_us = to_us(datetime.now(UTC)) // 1000 * 1000
        own = of_events.take(~of_events.is_mirrored)
        lines.received_us[own.position] = now_us + _ahead_us([outlet.cluster for outlet in outlets], sending)[own.cluster]
    values = encoder.encode(events, lines, of_events.position).split(b"\n") if len(of_events.position) else []
    ids = encode.uuids(events.raw_ids[lines.identity[of_events.position]])
    sent = zip((row.tobytes() for row in ids), values, strict=False)  # after the last newline the values have an empty one
    records: list[list[tuple[str, bytes | None, bytes]]] = [[] for _ in outlets]
    for position, cluster, is_order in zip(chunk.position.tolist(), chunk.cluster.tolist(), chunk.is_order.tolist(), strict=True):
        topics = outlets[cluster].cluster
        if is_order:
            line = traffic.order_lines[position]
            key = None if line.record is None else str(line.record["order_id"]).encode()
            records[cluster].append((topics.orders_topic, key, line.text))
        else:
            records[cluster].append((topics.events_topic, *next(sent)))
    for outlet, mine in zip(outlets, records, strict=True):
        if mine:
            outlet.send(mine)


class _Outlet:
    """A producer of one cluster. Raises an error for every record that the cluster does not accept."""

    def __init__(self, cluster: Cluster, sending: Sending, seed: int) -> None:
        self.cluster = cluster
        self._failure: str | None = None
        self._failed = 0
        self._rng = np.random.default_rng([seed, 2])
        self._abort_some, self._transactional = sending.abort_some, sending.transactional
        settings = _DEFAULTS | dict(cluster.options) | {"enable.idempotence": "true", "partitioner": "murmur2_random"}
        if sending.transactional:
            settings["transactional.id"] = f"adtally-simulate-{cluster.name}-{seed}"
        try:
            self._producer = Producer(
                {**settings, "delivery.report.only.error": True, "on_delivery": self._delivered, "error_cb": lambda _error: None}
            )
        except KafkaException as error:
            raise SimulationError(f"the options of cluster {cluster.name} cannot be right: {_said(error)}") from None
        try:
            there = self._producer.list_topics(timeout=_ANSWER_SECONDS).topics
        except KafkaException as error:
            raise DeliveryError(f"Kafka of {cluster.name} does not answer: {_said(error)}", hint=_START) from None
        for topic in (cluster.events_topic, cluster.orders_topic):
            if topic not in there:
                raise DeliveryError(f"Kafka of {cluster.name} has no topic {topic}", hint=_START)
        if sending.transactional:
            self._producer.init_transactions(_TRANSACTION_SECONDS)

    def send(self, records: Sequence[tuple[str, bytes | None, bytes]]) -> None:
        """Send records in this order, in one transaction if the sending is transactional."""
        if not self._transactional:
            self._produce(records)
            return
        if self._rng.random() < self._abort_some:
            self._producer.begin_transaction()
            self._produce(records)
            self.flush()
            self._producer.abort_transaction(_TRANSACTION_SECONDS)
        for attempt in range(_ATTEMPTS):
            self._producer.begin_transaction()
            self._produce(records)
            try:
                self._commit()
                break
            except KafkaException as error:
                if not _kafka_error(error).txn_requires_abort() or attempt == _ATTEMPTS - 1:
                    raise
                self._producer.abort_transaction(_TRANSACTION_SECONDS)
                self._failure, self._failed = None, 0  # the failed records are sent again
        self._raise_failure()

    def _commit(self) -> None:
        end = time.monotonic() + _TRANSACTION_SECONDS
        while True:
            try:
                self._producer.commit_transaction(_TRANSACTION_SECONDS)
                return
            except KafkaException as error:
                if not _kafka_error(error).retriable() or time.monotonic() > end:
                    raise

    def _produce(self, records: Sequence[tuple[str, bytes | None, bytes]]) -> None:
        produce, poll = self._producer.produce, self._producer.poll
        for topic, key, value in records:
            while True:
                try:
                    produce(topic, value, key)
                    break
                except BufferError:  # the queue is full
                    poll(0.05)
                    self._raise_failure()
        poll(0)
        self._raise_failure()

    def flush(self) -> None:
        """Wait until the broker has accepted all records. Raises DeliveryError if it did not."""
        while self._producer.flush(1.0):
            self._raise_failure()  # each record has its own timeout
        self._raise_failure()

    def close(self) -> None:
        """Drop unsent records: an error has reported them."""
        self._producer.purge()

    def _delivered(self, error: KafkaError | None, _record: object) -> None:
        if error is not None and error.code() not in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT):
            self._failure = error.str()
            self._failed += 1

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise DeliveryError(
                f"Kafka of {self.cluster.name} did not take {self._failed} records: {self._failure}",
                hint="what was sent counts once: send all of it again",
            )


def _kafka_error(error: KafkaException) -> KafkaError:
    found = error.args[0]
    assert isinstance(found, KafkaError)
    return found


def _said(error: KafkaException) -> str:
    return " ".join(_kafka_error(error).str().split())
