"""Measures health signals, each with a threshold and a runbook. Cheap enough for every half minute: reads no history, no Spark."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from spark_jobs.config import Settings
from spark_jobs.erasure.job import due_erasures, queued_erasures, unproven_runs
from spark_jobs.errors import AdtallyError
from spark_jobs.failure import one_line
from spark_jobs.ingest.files.backlog import read_landing
from spark_jobs.ingest.in_force import campaign_file_problems, rule_file_problems
from spark_jobs.ingest.kafka.config import read_kafka
from spark_jobs.ingest.kafka.topics import oldest_waiting, read_topic_sources
from spark_jobs.lake.duck import literal
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.marts import readable_marts
from spark_jobs.lake.tables import BATCH_LEDGER, EVENTS, STREAMS, Table
from spark_jobs.operate.status import read_recent_problems, read_unaccounted
from spark_jobs.publish.progress import read_publications
from spark_jobs.rules.exempt import plain
from spark_jobs.texts import counted, duration
from spark_jobs.traffic.rules import current_rules

RECENT = timedelta(hours=1)
MIN_OFFERED = 1_000  # a share of fewer records says nothing
_PROBLEMS_SHOWN = 5


@dataclass(frozen=True)
class Signal:
    """A measured value and its threshold. ``value`` None: it could not be measured; ``detail`` says why."""

    name: str
    ok: bool
    value: float | None
    threshold: float
    unit: str
    detail: str
    runbook: str


def read_signal(settings: Settings, name: str, *, now: datetime | None = None) -> Signal:
    """Measure one of SIGNALS. Raises KeyError for another name."""
    measure, threshold_of, unit = _SIGNALS[name]
    threshold = threshold_of(settings)
    runbook = f"docs/runbooks/{'conservation-broken' if name == 'conservation' else name.replace('_', '-')}.md"
    try:
        value, detail = measure(settings, now or datetime.now(UTC))
    except (AdtallyError, OSError, duckdb.Error) as error:
        return Signal(name, False, None, threshold, unit, f"cannot be measured: {one_line(error)}", runbook)
    ok = value >= threshold if name == "disk_space" else value <= threshold
    return Signal(name, ok, value, threshold, unit, detail, runbook)


def _stream_lag(settings: Settings, now: datetime) -> tuple[float, str]:
    """Return the seconds since the oldest landing file or topic record arrived that no finished batch has read; 0 if none.

    Skips topics of a cluster that does not answer: `kafka_clusters` reports those.
    """
    found = [*_waiting_files(settings, now), *_waiting_records(settings, now)]
    if not found:
        return 0.0, "no landing file waits" + (", no record of a topic" if read_kafka(settings).consumed else "")
    return max(seconds for seconds, _ in found), "; ".join(said for _, said in found)


def _waiting_files(settings: Settings, now: datetime) -> Iterator[tuple[float, str]]:
    """Yield (seconds, detail) of waiting files, also those of an unfinished batch. A file arrives when it is renamed into place."""
    for found in read_landing(settings).waiting:
        seconds = max(0.0, (now - found.waiting_since).total_seconds())
        count = counted(found.files, "file")
        yield seconds, f"{found.stream}/{found.region}: {count} waiting, the oldest is {found.oldest}, {duration(seconds)}"


def _waiting_records(settings: Settings, now: datetime) -> Iterator[tuple[float, str]]:
    for source in read_topic_sources(settings):
        arrived = oldest_waiting(settings, source)
        if arrived is not None:
            seconds = max(0.0, now.timestamp() - arrived)
            where = f"topic {source.topic} of cluster {source.cluster}"
            yield seconds, f"{source.stream}: {source.lag:,} offsets of {where} wait, the oldest for {duration(seconds)}"


def _kafka_clusters(settings: Settings, now: datetime) -> tuple[float, str]:
    """Return the number of topics that cannot be read: their cluster does not answer, or does not have them."""
    found = read_topic_sources(settings)
    away = [source for source in found if source.problem is not None]
    if not found:
        return 0.0, "no cluster of Kafka is ingested"
    said = "; ".join(dict.fromkeys(source.problem or "" for source in away))
    return float(len(away)), said or f"{len(found)} topics answer"


def _ignored_files(settings: Settings, now: datetime) -> tuple[float, str]:
    """Return the number of files in places that nothing reads."""
    found = read_landing(settings)
    return float(found.ignored_files), found.ignored_text or "whatever lies in the landing folder is read"


def _freshness(settings: Settings, now: datetime) -> tuple[float, str]:
    """Return the seconds since the first change of the ledger that the published marts lack; 0 if they lack none."""
    log = Lake(settings).log(BATCH_LEDGER)
    newest, pinned = log.latest_version(), _pinned_version(settings)
    if newest is None:
        return 0.0, "nothing ingested yet"
    commits = (log.commit(version) for version in range(0 if pinned is None else pinned + 1, newest + 1))
    first = next((commit for commit in commits if commit is not None and commit.changes_rows), None)
    built = "there are no marts yet" if pinned is None else f"the marts have batch_ledger at version {pinned} of {newest}"
    return (0.0 if first is None else max(0.0, now.timestamp() - first.committed_ms / 1000)), built


def _pinned_version(settings: Settings) -> int | None:
    """Return the ledger's version in the newest group of marts, None if there are no marts."""
    path = readable_marts(settings)
    if path is None:
        return None
    with duckdb.connect(":memory:") as connection:  # a new instance opens the current file, even if an older one is still open
        connection.execute(f"attach {literal(path)} as marts (read_only)")
        newest = "select max(delta_version) from marts.main.mart_build where table_name = 'batch_ledger'"
        ((version,),) = connection.execute(newest).fetchall()
    return None if version is None else int(version)


def _publishing_behind(settings: Settings, now: datetime) -> tuple[float, str]:
    """Return the seconds since the first unpublished version; 0 if all are published, or publishing is not set up."""
    found = read_publications(settings, now=now)
    if not found:
        return 0.0, "nothing is to be published"
    parts = [
        f"{each.topic}: {'nothing' if each.version is None else f'version {each.version}'} of {each.table} is published, "
        f"{each.versions_behind} behind"
        for each in found
    ]
    return max(each.seconds_behind for each in found), "; ".join(parts)


def _share(settings: Settings, now: datetime, outcome: str) -> tuple[float, str]:
    """Return the share of an outcome in the records offered in the batches of the last hour; 0 below MIN_OFFERED."""
    counts = recent_counts(settings, now - RECENT)
    offered, found = counts["offered"], counts[outcome]
    detail = f"{found:,} {outcome} of {offered:,} offered in the last hour"
    return (found / offered if offered >= MIN_OFFERED else 0.0), detail


def recent_counts(settings: Settings, since: datetime) -> Counter[str]:
    """Sum the ledger (offered, rejected, duplicate) over the batches that were committed at ``since`` or later."""
    total: Counter[str] = Counter()
    for commit in Lake(settings).log(BATCH_LEDGER).commits_backwards():
        if commit.committed_ms / 1000 < since.timestamp():
            break
        for path in commit.added_paths:
            total.update(_file_counts(settings, path))
    return total


@lru_cache(maxsize=16_384)
def _file_counts(settings: Settings, path: str) -> Counter[str]:
    """Return the sums of one data file of the ledger, which never changes, without rows of corrections, which are differences."""
    names = ("offered", "rejected", "duplicate", "_run_id")
    rows = _rows_of_file(settings, BATCH_LEDGER, path, *names)
    own = rows.filter(pc.is_null(rows["_run_id"]))
    return Counter({name: pc.sum(own[name]).as_py() or 0 for name in names[:-1]})


def _user_share(settings: Settings, now: datetime) -> tuple[float, str]:
    """Return the largest share of one user who is not exempt in the events of the last hour's batches; 0 below MIN_OFFERED."""
    total, users = 0, Counter[str]()
    for commit in Lake(settings).log(EVENTS).commits_backwards():
        if commit.committed_ms / 1000 < (now - RECENT).timestamp():
            break
        for path in () if commit.data_removed else commit.added_paths:  # a review rewrites events and adds none
            rows, found = _file_users(settings, path)
            total += rows
            users.update(found)
    exempt = current_rules(settings).exempt_users
    known = [(count, user) for user, count in users.items() if plain(user) not in exempt]
    if total < MIN_OFFERED or not known:
        return 0.0, f"{counted(total, 'event')} in the last hour"
    count, user = max(known)
    return count / total, f"{count:,} of {total:,} events in the last hour are of user {user[:64]!r}"


@lru_cache(maxsize=4_096)
def _file_users(settings: Settings, path: str) -> tuple[int, dict[str, int]]:
    """Return (rows, user -> events) of one data file of events, which never changes, without users below one percent of it."""
    users = _rows_of_file(settings, EVENTS, path, "user_id")["user_id"]
    counts = pc.value_counts(users.combine_chunks())
    often = counts.filter(pc.greater_equal(counts.field("counts"), max(2, len(users) / 100)))
    return len(users), dict(zip(often.field("values").to_pylist(), often.field("counts").to_pylist(), strict=True))


def _rows_of_file(settings: Settings, table: Table, path: str, *names: str) -> pa.Table:
    """Read a data file that a commit added; no rows if fsck or an erasure has taken it out of the table since."""
    lake = Lake(settings)
    try:
        return lake.read_files(table, [path], *names)
    except FileNotFoundError:
        if path in lake.pin(table).paths(table):
            raise
        return table.schema.empty_table().select(names)


def _conservation(settings: Settings, now: datetime) -> tuple[float, str]:
    """Return the number of contradictions between the tables in the batches of the last hour; `adtally status` checks all."""
    batches, problems = read_recent_problems(settings, now - RECENT)
    problems = [*problems, *read_unaccounted(settings, dict.fromkeys(STREAMS, now - RECENT))]
    shown = "; ".join(problems[:_PROBLEMS_SHOWN])
    more = f" and {len(problems) - _PROBLEMS_SHOWN} more" if len(problems) > _PROBLEMS_SHOWN else ""
    return float(len(problems)), f"{shown}{more}" if problems else f"{counted(batches, 'batch')} of the last hour: all adds up"


def _file_problems(problems: list[str], kind: str) -> tuple[float, str]:
    return float(len(problems)), "; ".join(problems) or f"the {kind} files can be read"


def _erasure_due(settings: Settings, now: datetime) -> tuple[float, str]:
    """Return the number of people whose erasure is due soon, or overdue, and of erasures that were begun and are not proven."""
    due, begun = due_erasures(settings, now), unproven_runs(settings)
    if not due and not begun:
        return 0.0, f"{counted(len(queued_erasures(settings)), 'request')} to erase a person, none due soon"
    first = f"; the first is due at {due[0].due_at(settings):%Y-%m-%d %H:%M}Z" if due else ""
    return float(len(due) + len(begun)), f"{counted(len(due), 'request')} due, {len(begun)} begun and not proven{first}"


def _disk_space(settings: Settings, now: datetime) -> tuple[float, str]:
    """Return the free bytes on the disk of ADTALLY_HOME."""
    folder = next(path for path in (settings.home_path, *settings.home_path.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    return float(free), f"{free / 1024**3:.1f} GiB are free"


# name -> (measure, threshold, unit)
_SIGNALS: dict[str, tuple[Callable[[Settings, datetime], tuple[float, str]], Callable[[Settings], float], str]] = {
    "stream_lag": (_stream_lag, lambda settings: settings.max_stream_lag.total_seconds(), "seconds"),
    "ignored_files": (_ignored_files, lambda settings: 0.0, "files"),
    "kafka_clusters": (_kafka_clusters, lambda settings: 0.0, "topics"),
    "freshness": (_freshness, lambda settings: settings.max_mart_age.total_seconds(), "seconds"),
    "publishing_behind": (_publishing_behind, lambda settings: settings.max_publish_lag.total_seconds(), "seconds"),
    "rejected_share": (partial(_share, outcome="rejected"), lambda settings: settings.max_rejected_share, "share"),
    "duplicate_share": (partial(_share, outcome="duplicate"), lambda settings: settings.max_duplicate_share, "share"),
    "user_share": (_user_share, lambda settings: settings.max_user_share, "share"),
    "conservation": (_conservation, lambda settings: 0.0, "contradictions"),
    "campaign_file": (lambda settings, _: _file_problems(campaign_file_problems(settings), "campaign"), lambda _: 0.0, "problems"),
    "rule_file": (lambda settings, _: _file_problems(rule_file_problems(settings), "rule"), lambda _: 0.0, "problems"),
    "erasure_due": (_erasure_due, lambda _: 0.0, "people"),
    "disk_space": (_disk_space, lambda settings: float(settings.min_free_bytes), "bytes"),
}
SIGNALS = tuple(_SIGNALS)
