"""The service's memory: one SQLite file, in which sums, record_uuids and offsets change in one transaction.

So the sums always match the offsets, even after a kill. If messages arrive again at other offsets (a second publication, a topic
made anew, a replay), the uuids identify them.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from services.budget.errors import BudgetUsageError
from services.budget.messages import BadMessage, Increment, parse

_APPLICATION = 0x61647462  # "adtb": SQLite's id of the application that owns the file
_FORMAT = 1
_SEALED = "its day is sealed"
_TOO_LARGE = "the sum of its campaign's day would not fit into 64 bits"
_OTHER_VALUES = "same record_uuid and version as one before, other values"

_SCHEMA = """
create table topics (topic text primary key, topic_id text not null, sealed_before text not null default '') strict;
create table offsets (
    topic text not null, partition integer not null, next_offset integer not null, highest_offset integer not null,
    primary key (topic, partition)
) strict, without rowid;
create table keys (
    id integer primary key, event_date text not null, campaign_id text not null, store_id text not null, currency text not null,
    impressions integer not null default 0, clicks integer not null default 0, spend_nanos integer not null default 0,
    unique (event_date, campaign_id, store_id, currency)
) strict;
create table increments (
    record_uuid blob primary key, version integer not null, key integer not null references keys (id),
    impressions integer not null, clicks integer not null, spend_nanos integer not null
) strict, without rowid;
create index increments_key on increments (key);
create table aside (
    topic text not null, topic_id text not null, partition integer not null, offset integer not null,
    reason text not null, key blob, value blob, kept_at text not null,
    primary key (topic, topic_id, partition, offset)
) strict, without rowid;
create table progress (
    topic text primary key, event_minute_ms integer not null, committed_ms integer not null, consumed_ms integer not null
) strict;
"""


@dataclass(frozen=True, slots=True)
class Message:
    """A Kafka message: its place and its bytes."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


@dataclass
class Loaded:
    """Counts of messages: ``added`` increments, ``replaced`` by a later version, seen before (``again``), put ``aside``."""

    added: int = 0
    replaced: int = 0
    again: int = 0
    aside: int = 0

    def plus(self, other: Loaded) -> Loaded:
        """Return the sum of both."""
        return Loaded(self.added + other.added, self.replaced + other.replaced, self.again + other.again, self.aside + other.aside)


class Store:
    """Reads and writes one file; use it as a context manager. One process writes at a time (``service`` locks), any number read.

    Raises BudgetUsageError if the file belongs to another program or has another format.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        if read_only and not path.exists():
            raise BudgetUsageError(f"there is no budget file {path}", hint="`adtally budget --once` makes it")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._open(read_only)
        except sqlite3.DatabaseError as error:
            raise BudgetUsageError(f"{path} is not a budget file: {error}", hint="name another with --store") from None

    def _open(self, read_only: bool) -> None:
        if read_only:
            self.db.execute("pragma query_only = on")
        else:
            self.db.execute("pragma journal_mode = wal")
            self.db.execute("pragma synchronous = full")
        application, found = (self.db.execute(f"pragma {name}").fetchone()[0] for name in ("application_id", "user_version"))
        is_empty = not self.db.execute("select count(*) from sqlite_master").fetchone()[0]
        if is_empty and not read_only:
            self.db.executescript(
                f"begin; {_SCHEMA} pragma application_id = {_APPLICATION}; pragma user_version = {_FORMAT}; commit;"
            )
        elif (application, found) != (_APPLICATION, _FORMAT):
            raise BudgetUsageError(f"{self.path} is not a budget file of format {_FORMAT}", hint="name another with --store")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self.db.execute("begin immediate")
        with self.db:  # commits, or rolls back after an exception
            yield

    def begin_topic(self, topic: str, topic_id: str) -> None:
        """Record the id of the topic. Forget the offsets of an earlier topic of the same name, so that reading starts anew."""
        with self._transaction():
            other = "select topic from topics where topic = ? and topic_id <> ?"
            self.db.execute(f"delete from offsets where topic in ({other})", (topic, topic_id))
            insert = "insert into topics (topic, topic_id) values (?, ?)"
            self.db.execute(f"{insert} on conflict do update set topic_id = excluded.topic_id", (topic, topic_id))

    def offsets(self, topic: str) -> dict[int, int]:
        """Return partition -> the next offset to read."""
        return dict(self.db.execute("select partition, next_offset from offsets where topic = ?", (topic,)).fetchall())

    def load(self, topic: str, messages: Sequence[Message], ends: dict[int, int], now: datetime) -> Loaded:
        """Add messages, in the order of each partition, and the offsets reached, in one transaction.

        ``ends``: partition -> offset that was reached without a message, as after transaction markers.
        """
        done = Loaded()
        reached = dict(ends)
        for message in messages:
            reached[message.partition] = max(message.offset + 1, reached.get(message.partition, 0))
        with self._transaction():
            topic_id, sealed = self.db.execute("select topic_id, sealed_before from topics where topic = ?", (topic,)).fetchone()
            highest = dict(self.db.execute("select partition, highest_offset from offsets where topic = ?", (topic,)).fetchall())
            latest = [0, 0]
            for message in messages:
                try:
                    increment = parse(message.key, message.value)
                except BadMessage as bad:
                    done.aside += self._put_aside(topic, topic_id, message, str(bad), now)
                    continue
                if increment.event_date >= sealed:
                    self._apply(topic, topic_id, message, increment, done, now)
                    latest = [max(latest[0], increment.event_minute_ms), max(latest[1], increment.committed_ms)]
                elif message.offset < highest.get(message.partition, 0):
                    done.again += 1  # these very bytes were loaded before
                else:
                    done.aside += self._put_aside(topic, topic_id, message, _SEALED, now)
            self.db.executemany(
                "insert into offsets values (?, ?, ?, ?) on conflict do update set next_offset = excluded.next_offset, "
                "highest_offset = max(highest_offset, excluded.highest_offset)",
                [(topic, partition, offset, offset) for partition, offset in reached.items()],
            )
            if latest[1]:
                self.db.execute(
                    "insert into progress values (?, ?, ?, ?) on conflict do update set consumed_ms = excluded.consumed_ms, "
                    "event_minute_ms = max(event_minute_ms, excluded.event_minute_ms), "
                    "committed_ms = max(committed_ms, excluded.committed_ms)",
                    (topic, *latest, int(now.timestamp() * 1000)),
                )
        return done

    def _apply(self, topic: str, topic_id: str, message: Message, increment: Increment, done: Loaded, now: datetime) -> None:
        key = self._key(increment)
        before = self.db.execute(
            "select version, key, impressions, clicks, spend_nanos from increments where record_uuid = ?", (increment.uuid,)
        ).fetchone()
        measures = (increment.impressions, increment.clicks, increment.spend_nanos)
        changes = [(key, measures)]
        if before is not None:
            if increment.version <= before[0]:
                if increment.version == before[0] and (key, *measures) != before[1:]:
                    done.aside += self._put_aside(topic, topic_id, message, _OTHER_VALUES, now)
                else:
                    done.again += 1
                return
            changes.insert(0, (before[1], (-before[2], -before[3], -before[4])))
        if not self._add(changes):
            done.aside += self._put_aside(topic, topic_id, message, _TOO_LARGE, now)
            return
        done.added += before is None
        done.replaced += before is not None
        self.db.execute(
            "insert or replace into increments values (?, ?, ?, ?, ?, ?)", (increment.uuid, increment.version, key, *measures)
        )

    def _key(self, increment: Increment) -> int:
        names = (increment.event_date, increment.campaign_id, increment.store_id, increment.currency)
        # the update changes nothing, but makes the statement return the id of an existing row too
        insert = "insert into keys (event_date, campaign_id, store_id, currency) values (?, ?, ?, ?)"
        row = self.db.execute(f"{insert} on conflict do update set currency = excluded.currency returning id", names).fetchone()
        return int(row[0])

    def _add(self, changes: Sequence[tuple[int, tuple[int, int, int]]]) -> bool:
        """Add to the sums of keys. Return False, and add nothing, if a sum would not fit into 64 bits."""
        sums: dict[int, tuple[int, int, int]] = {}
        for key, (impressions, clicks, nanos) in changes:
            if key not in sums:
                sums[key] = self.db.execute("select impressions, clicks, spend_nanos from keys where id = ?", (key,)).fetchone()
            sums[key] = (sums[key][0] + impressions, sums[key][1] + clicks, sums[key][2] + nanos)
        if any(not -(2**63) <= measure < 2**63 for measures in sums.values() for measure in measures):
            return False
        for key, measures in sums.items():
            self.db.execute("update keys set impressions = ?, clicks = ?, spend_nanos = ? where id = ?", (*measures, key))
        return True

    def _put_aside(self, topic: str, topic_id: str, message: Message, reason: str, now: datetime) -> int:
        kept_at = now.astimezone(UTC).isoformat(timespec="milliseconds")
        place = (topic, topic_id, message.partition, message.offset)
        values = (*place, reason, message.key, message.value, kept_at)
        return self.db.execute("insert or ignore into aside values (?, ?, ?, ?, ?, ?, ?, ?)", values).rowcount

    def seal(self, topic: str, before: str) -> None:
        """Forget the uuids of days before ``before`` (YYYY-MM-DD). Their sums stay, and are final.

        Without its uuid a repeated increment looks like a new one. So later increments of such a day are put aside, neither added
        nor lost.
        """
        with self._transaction():
            self.db.execute("update topics set sealed_before = max(sealed_before, ?) where topic = ?", (before, topic))
            self.db.execute("delete from increments where key in (select id from keys where event_date < ?)", (before,))

    def sums(self, day: str | None = None) -> list[tuple[str, str, str, str, int, int, int]]:
        """Return (event_date, campaign_id, store_id, currency, impressions, clicks, spend_nanos), sorted, of one day or of all."""
        return self.db.execute(
            "select event_date, campaign_id, store_id, currency, impressions, clicks, spend_nanos from keys "
            "where ?1 is null or event_date = ?1 order by 1, 2, 3, 4",
            (day,),
        ).fetchall()

    def asides(self) -> Counter[str]:
        """Return reason -> messages put aside for it."""
        return Counter(dict(self.db.execute("select reason, count(*) from aside group by reason").fetchall()))
