"""Erase people: decide, write the decision ahead, carry it out in steps that each happen once, prove it, forget the ids.

A run is a file with the ids and their tokens, which only its owner can read. It is there from the decision to the receipt. Whoever
is killed leaves it behind, and the next command that corrects tables finishes its steps (`finish_erasures`). The order matters:

1. The suppression list gets the tokens. From then on no record brings an id back.
2. Landing files and rule files are replaced; table `erasures` gets their states before and after, for the recount.
3. Each table is rewritten in one commit. Then data files of older versions that still have an id are deleted.
4. What is derived (indexes, parsed input, marts) is dropped. The next user of it builds it again.

`prove` then reads everything that is left and writes the receipt.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa

from spark_jobs.attribution.rules import load_attribution_rules
from spark_jobs.config import Settings
from spark_jobs.erasure.inputs import RULES, InputFile, plan_inputs, replace_input
from spark_jobs.erasure.lines import People, rewrite_strings
from spark_jobs.erasure.proof import Search, differences, search, search_file, totals
from spark_jobs.erasure.suppression import (
    QUEUE,
    RECEIPTS,
    RUNS,
    Suppression,
    erasure_place,
    own_suppression,
    read_suppression,
    write_suppression,
)
from spark_jobs.erasure.tables import PERSONAL, FingerprintMap, count_rows, rewrite_log, rewrite_table
from spark_jobs.errors import AdtallyError, UsageError
from spark_jobs.ingest.files.landing import walk_landing
from spark_jobs.lake.acts import Act, record_act
from spark_jobs.lake.checkpoint_copy import checkpoints_to_read
from spark_jobs.lake.commit import Transaction
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.landing_view import fresh_rules_path, refresh_landing
from spark_jobs.lake.locks import ATTRIBUTION, CORRECTIONS, INGEST, MARTS, REWRITE, WRITE_EVENTS, WRITE_ORDERS, exclusive, is_held
from spark_jobs.lake.marts import current_marts
from spark_jobs.lake.places import open_place, state_copies
from spark_jobs.lake.removal import delete_older_files, files_of_older_versions
from spark_jobs.lake.tables import ATTRIBUTED_ORDERS, BATCH_LEDGER, ERASURES, EVENTS, ORDERS, Table
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.publish.progress import read_publications
from spark_jobs.rules.exempt import PLACEHOLDERS, plain
from spark_jobs.steps import Step, durable
from spark_jobs.traffic.rules import current_rules, is_in_listed_network

TOKEN_PREFIX = "erased-"
DUE_SOON = timedelta(days=7)
"""How long before a request is due `alert_erasure_due` names it."""
_LONGEST_ID = 128  # characters, as the contract has it
_LOCKS = (ATTRIBUTION, CORRECTIONS, MARTS, REWRITE, WRITE_EVENTS, WRITE_ORDERS)
_DERIVED = ("recount", "attribution_index")
_OWN_TEXTS = ("quality/", "logs/")
Say = Callable[[str], None]


def random_token() -> str:
    """Return a new token: nobody can guess it, and it says what it is."""
    return TOKEN_PREFIX + secrets.token_hex(8)


@dataclass(frozen=True)
class Request:
    """A request to erase a person that waits in the queue, as file ``name``."""

    user_id: str = field(repr=False)
    requested_at: datetime
    name: str

    def due_at(self, settings: Settings) -> datetime:
        """Return by when it must be carried out."""
        return self.requested_at + timedelta(days=settings.erasure_days)


@dataclass
class Run:
    """An erasure that is decided. ``rows`` counts the changed rows by table; ``totals`` are from before the first change."""

    erasure_id: str
    decided_at: datetime
    requested: dict[str, datetime] = field(repr=False)  # by id
    tokens: dict[str, str] = field(repr=False)  # by id
    files: list[InputFile]
    landing_names: list[str]
    fingerprints: dict[str, list[tuple[str, str, str]]]
    totals: dict[str, str]
    versions: dict[str, int]
    had_marts: bool
    is_carried_out: bool = False
    rows: dict[str, int] = field(default_factory=dict)
    old_files: int = 0

    @property
    def people(self) -> People:
        """The people, for whatever replaces or finds ids."""
        return People(self.tokens)

    def to_json(self) -> bytes:
        """Return the run as its file has it."""
        return json.dumps(asdict(self), default=datetime.isoformat).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Run:
        """Read a run's file."""
        found: dict[str, Any] = json.loads(data)
        found["decided_at"] = datetime.fromisoformat(found["decided_at"])
        found["requested"] = {one: datetime.fromisoformat(at) for one, at in found["requested"].items()}
        found["files"] = [InputFile(**one) for one in found["files"]]
        return cls(**found)


@dataclass(frozen=True)
class Preview:
    """Where the ids are, and what an erasure would rewrite: lines by file, rows by table, data files of older versions by table."""

    people: int
    lines: dict[str, int]
    rows: dict[str, int]
    old_files: dict[str, int]

    @property
    def is_empty(self) -> bool:
        """Whether nobody of the people is anywhere."""
        return not (self.lines or self.rows or self.old_files)


@dataclass(frozen=True)
class Receipt:
    """What an erasure did, for whoever asks: no id, only the ``people`` as HMAC. ``reconciled`` is None if no recount was made."""

    erasure_id: str
    people: list[str]
    decided_at: datetime
    proven_at: datetime
    files_rewritten: int
    rows_rewritten: dict[str, int]
    old_files_deleted: int
    versions: dict[str, int]
    files_searched: int
    bytes_searched: int
    totals: dict[str, str]
    totals_equal: bool
    reconciled: bool | None


# --- the queue


def queue_erasure(settings: Settings, user_ids: Iterable[str], now: datetime) -> int:
    """Put requests into the queue; returns how many people are new there. They are carried out together."""
    waiting = {one.user_id for one in queued_erasures(settings)}
    wanted = [one for one in _checked(settings, user_ids) if one not in waiting]
    place = erasure_place(settings)
    for user_id in wanted:
        with durable(Step.ERASURE_QUEUED):
            data = json.dumps({"user_id": user_id, "requested_at": now.isoformat()}).encode()
            place.write_private(f"{QUEUE}/{uuid4().hex}.json", data)
    return len(wanted)


def queued_erasures(settings: Settings) -> list[Request]:
    """Return the requests in the queue, the oldest first."""
    place = erasure_place(settings)
    found = []
    for file in place.list(QUEUE):
        with suppress(FileNotFoundError):
            stored = json.loads(place.read(file.name))
            found.append(Request(stored["user_id"], datetime.fromisoformat(stored["requested_at"]), file.name))
    return sorted(found, key=lambda one: one.requested_at)


def due_erasures(settings: Settings, now: datetime) -> list[Request]:
    """Return the requests in the queue that are due within DUE_SOON, or overdue."""
    return [one for one in queued_erasures(settings) if one.due_at(settings) - DUE_SOON <= now]


def unproven_runs(settings: Settings) -> list[Run]:
    """Return the erasures that are decided and have no receipt yet, the oldest first."""
    place = erasure_place(settings)
    runs = []
    for file in place.list(RUNS):
        with suppress(FileNotFoundError):
            runs.append(Run.from_json(place.read(file.name)))
    return sorted(runs, key=lambda run: run.decided_at)


# --- deciding


def preview(settings: Settings, user_ids: Iterable[str]) -> Preview:
    """Find people everywhere and change nothing."""
    people = People({one: random_token() for one in _checked(settings, user_ids)})
    lines: dict[str, int] = {}

    def count(name: str, _before: bytes, _after: bytes) -> None:
        lines[name] = lines.get(name, 0) + 1

    found = FingerprintMap(people)
    for file in plan_inputs(settings, people, count):
        lines.setdefault(file.name, 1)
    lake = Lake(settings)
    found.add_tables(lake)
    fingerprints = found.made()
    rows = {table.name: count_rows(lake, table, people, fingerprints) for table in PERSONAL if lake.exists(table)}
    older = {table.name: len(_old_files_of(settings, lake, people, table)) for table in PERSONAL if lake.exists(table)}
    kept = ({name: count for name, count in counts.items() if count} for counts in (lines, rows, older))
    return Preview(len(people.tokens), *kept)


def erase(
    settings: Settings,
    user_ids: Iterable[str] = (),
    *,
    now: datetime | None = None,
    new_token: Callable[[], str] = random_token,
    say: Say = lambda _: None,
) -> list[Run]:
    """Erase ``user_ids`` and everybody in the queue, in one rewrite; finish what a killed run left.

    Returns the runs whose proof is missing (`prove`); none if there was nothing to do. Raises UsageError for what is no id of a
    person, AdtallyError if a batch of the ingest has to be finished first, BusyError if another command does not end in time.
    """
    now = now or datetime.now(UTC)
    ids = _checked(settings, user_ids)
    with _alone(settings):
        _finish(settings, say)
        requested = {one.user_id: one.requested_at for one in queued_erasures(settings)}
        requested = {**dict.fromkeys(ids, now), **requested}
        if requested:
            ensure_tables(settings)
            _refuse_open_batches(settings)
            _refuse_unpublished(settings)
            run = _decide(settings, requested, now, new_token, say)
            _carry_out(settings, run, say)
    return unproven_runs(settings)


def finish_erasures(settings: Settings, *, patience_seconds: float | None = None) -> None:
    """Finish the steps of erasures that were killed. Does nothing if there are none."""
    if any(not run.is_carried_out for run in unproven_runs(settings)):
        with _alone(settings, patience_seconds):
            _finish(settings, lambda _: None)


@contextmanager
def _alone(settings: Settings, patience_seconds: float | None = None) -> Iterator[None]:
    """Hold every lock under which somebody reads or writes what an erasure replaces. A batch of an ingest waits meanwhile."""
    with exclusive(settings, *_LOCKS, patience_seconds=patience_seconds):
        yield


def _finish(settings: Settings, say: Say) -> None:
    for run in unproven_runs(settings):
        if not run.is_carried_out:
            _refuse_open_batches(settings)
            _carry_out(settings, run, say)


def _checked(settings: Settings, user_ids: Iterable[str]) -> list[str]:
    """Return the ids, each once. Raises UsageError for an id that no person has."""
    ids = list(dict.fromkeys(user_ids))
    rules = current_rules(settings)
    exempt = {*PLACEHOLDERS, *rules.exempt_users, *load_attribution_rules(settings).exempt_users}
    known = read_suppression(settings)
    tokens = set() if known is None else set(known.tokens.values())
    for one in ids:
        if not 1 <= len(one) <= _LONGEST_ID or any("\ud800" <= character <= "\udfff" for character in one):
            raise UsageError(f"{one!r} is no user id", hint=f"an id has 1 to {_LONGEST_ID} characters")
        if plain(one) in exempt:
            raise UsageError(f"{one!r} stands for everybody who is unknown, not for a person", hint="docs/erasure.md")
        if is_in_listed_network(rules, one):
            raise UsageError(
                f"{one!r} is an address in a listed network: under a token its events would be judged in another way",
                hint="put the address itself on the operator's list, and run `adtally backfill` for its hours; docs/erasure.md",
            )
        if one in tokens:
            raise UsageError(f"{one} is the token of a person who is erased already")
    return ids


def _refuse_open_batches(settings: Settings) -> None:
    """Raise AdtallyError if a killed batch has committed records: on other input it could not decide the same again."""
    lake, checkpoints = Lake(settings), checkpoints_to_read(settings)
    for stream, table in (("events", EVENTS), ("orders", ORDERS)):
        for folder in (checkpoints / stream, *sorted(checkpoints.glob(f"{stream}-*"))):
            with suppress(FileNotFoundError):
                query_id = json.loads((folder / "metadata").read_text("utf-8"))["id"]
                batch = lake.last_transaction(table, query_id)
                if batch is not None and not lake.has(BATCH_LEDGER, Transaction(query_id, batch)):
                    raise AdtallyError(
                        f"batch {batch} of {folder.name} was interrupted and is not complete",
                        hint="run `adtally ingest`, which finishes it, then erase",
                    )


def _refuse_unpublished(settings: Settings) -> None:
    """Raise AdtallyError if credits wait to be published: their data files may be deleted."""
    for topic in read_publications(settings):
        if topic.table == ATTRIBUTED_ORDERS.name and topic.versions_behind:
            raise AdtallyError(
                f"{topic.versions_behind} versions of {topic.table} wait to be published to {topic.topic}",
                hint="run `adtally publish`, then erase; the tokens are published after that, under the same keys",
            )


def _decide(settings: Settings, requested: Mapping[str, datetime], now: datetime, new_token: Callable[[], str], say: Say) -> Run:
    suppression = own_suppression(settings)
    tokens = {one: suppression.token_of(one) or new_token() for one in requested}
    people = _with_others(tokens, suppression)
    found = FingerprintMap(people)
    say("reading the input")
    files = plan_inputs(
        settings, people, lambda name, before, _: found.add_line(name.split("/")[0], before) if "/" in name else None
    )
    say("reading the tables")
    lake = Lake(settings)
    found.add_tables(lake)
    run = Run(
        uuid4().hex,
        now,
        dict(requested),
        tokens,
        files,
        sorted(entry.name for entry in walk_landing(settings.landing_path) if entry.reason is None),
        {stream: [(*key, new) for key, new in pairs.items()] for stream, pairs in found.made().items()},
        totals(settings),
        _versions(lake),
        current_marts(settings).path is not None,
    )
    _write(settings, run, Step.ERASURE_DECIDED)
    return run


def _versions(lake: Lake) -> dict[str, int]:
    return {table.name: version for table in PERSONAL if lake.exists(table) and (version := lake.version(table)) is not None}


def _write(settings: Settings, run: Run, step: Step) -> None:
    with durable(step):
        erasure_place(settings).write_private(f"{RUNS}/{run.erasure_id}.json", run.to_json())


# --- carrying out


def _carry_out(settings: Settings, run: Run, say: Say) -> None:
    """Do the missing steps of a run. Each finds out by itself whether it is done."""
    suppression = own_suppression(settings)
    wanted = suppression.plus(run.tokens)
    if wanted != suppression:
        write_suppression(settings, wanted)
    people = _with_others(run.tokens, suppression)
    lake = Lake(settings)
    for number, file in enumerate(run.files):
        say(f"rewriting {file.name}")
        replace_input(settings, file, people, number)
    refresh_landing(settings, is_full=True)  # objects have new times
    _note_files(lake, run)
    fingerprints = {stream: {(one, old): new for one, old, new in found} for stream, found in run.fingerprints.items()}
    for number, table in enumerate(PERSONAL):
        say(f"rewriting table {table.name}")
        changed = rewrite_table(lake, table, run.people, fingerprints, run.erasure_id, number)
        if changed:
            run.rows[table.name] = changed
        rewrite_log(lake, table, run.people, number)
    for number, table in enumerate(PERSONAL):
        paths = _old_files_of(settings, lake, run.people, table)
        delete_older_files(lake, table, paths, number)
        run.old_files += len(paths)
    say("dropping what is derived")
    _drop_derived(settings, run.people)
    run.is_carried_out = True
    _write(settings, run, Step.ERASURE_CARRIED_OUT)


def _with_others(tokens: Mapping[str, str], suppression: Suppression) -> People:
    """Return the people of a run, and those who were erased before: their files may have come since. The same before and after."""
    own = set(tokens.values())
    others = Suppression(suppression.key, {person: token for person, token in suppression.tokens.items() if token not in own})
    return People(tokens, others.token_of if others.tokens else None)


def _note_files(lake: Lake, run: Run) -> None:
    """Append the states of the replaced landing files to `erasures`, once."""
    rows = [{**file.row(), "erasure_id": run.erasure_id, "erased_at": run.decided_at} for file in run.files if file.root != RULES]
    if rows:
        _append(lake, rows, Transaction(run.erasure_id, 0))


def _append(lake: Lake, rows: list[dict[str, Any]], transaction: Transaction) -> None:
    lake.append(ERASURES, pa.Table.from_pylist(rows, ERASURES.schema), Step.ERASURES, transaction=transaction)


def _old_files_of(settings: Settings, lake: Lake, people: People, table: Table) -> list[str]:
    """Return the data files of older versions of a table that have one of the people."""
    place = open_place(lake.uri(table))
    return [name for name in files_of_older_versions(lake, table) if search_file(settings, place, name, people)]


def _drop_derived(settings: Settings, people: People) -> None:
    """Delete what can be built again, and rewrite the texts that adtally wrote for people to read."""
    for name in _DERIVED:
        shutil.rmtree(settings.home_path / name, ignore_errors=True)
    if not is_held(settings, INGEST):  # a running ingest rebuilds its index itself, with its next batch
        shutil.rmtree(settings.key_index_path, ignore_errors=True)
        copies = state_copies(settings, settings.key_index_path.name)
        if copies is not None:
            copies.delete_folder("")
        shutil.rmtree(settings.scratch_path, ignore_errors=True)
    _drop_marts(settings)
    fresh_rules_path(settings)  # of lists in a store, the copy of this machine
    for uri in {str(settings.home_path), settings.state_uri}:
        place = open_place(uri)
        for name in list(place.every_name()):
            if name.startswith(_OWN_TEXTS):
                with suppress(FileNotFoundError):
                    data = place.read(name)
                    made = rewrite_strings(data, people)
                    if made != data and _is_text(data):
                        place.write(name, made)
                    elif search_file(settings, place, name, people):
                        place.delete([name])


def _is_text(data: bytes) -> bool:
    try:
        return "\0" not in data.decode("utf-8")
    except UnicodeDecodeError:
        return False


def _drop_marts(settings: Settings) -> None:
    """Delete the published marts of this machine and of the store. Whoever has the old file open keeps it until it is closed."""
    folder = settings.marts_path.parent
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix == ".lock":
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    copies = state_copies(settings, folder.name)
    if copies is not None:
        copies.delete_folder("")


# --- the proof


def prove(settings: Settings, run: Run, *, now: datetime | None = None, reconciled: bool | None = None) -> Receipt:
    """Read everything that is left, compare the totals, write the receipt, and forget the ids.

    ``reconciled`` says whether a recount agrees with the tables. Raises AdtallyError, and keeps the run, if an id is found or a
    total has changed.
    """
    now = now or datetime.now(UTC)
    found = search(settings, run.people, run.landing_names)
    if found.findings:
        raise AdtallyError(_still_there(found), hint="docs/runbooks/erasure-due.md; run `adtally erase` again when it is gone")
    lake = Lake(settings)
    after, versions = totals(settings), _versions(lake)
    has_news = versions.get(BATCH_LEDGER.name) != run.versions.get(BATCH_LEDGER.name)
    different = [] if has_news else differences(run.totals, after)
    if different:
        raise AdtallyError(f"the erasure changed {', '.join(different)}", hint="docs/runbooks/erasure-due.md")
    if reconciled is False:
        raise AdtallyError(
            "a recount of the rewritten input differs from the tables", hint="adtally reconcile names each difference"
        )
    suppression = own_suppression(settings)
    receipt = Receipt(
        erasure_id=run.erasure_id,
        people=sorted(map(suppression.person, run.tokens)),
        decided_at=run.decided_at,
        proven_at=now,
        files_rewritten=len(run.files),
        rows_rewritten=run.rows,
        old_files_deleted=run.old_files,
        versions=versions,
        files_searched=found.files,
        bytes_searched=found.bytes,
        totals=after,
        totals_equal=not has_news,
        reconciled=reconciled,
    )
    _keep_receipt(settings, lake, run, receipt)
    return receipt


def _still_there(found: Search) -> str:
    first = found.findings[0]
    others = f" and {len(found.findings) - 1} other files" if len(found.findings) > 1 else ""
    return f"an id is still in {first.place} ({first.count} times){others}"


def _keep_receipt(settings: Settings, lake: Lake, run: Run, receipt: Receipt) -> None:
    suppression = own_suppression(settings)
    detail = json.dumps({name: value for name, value in asdict(receipt).items() if name != "people"}, default=datetime.isoformat)
    rows = [
        {
            "erasure_id": run.erasure_id,
            "kind": "receipt",
            "person": suppression.person(one),
            "detail": detail,
            "requested_at": at,
            "erased_at": receipt.proven_at,
        }
        for one, at in run.requested.items()
    ]
    _append(lake, rows, Transaction(run.erasure_id, 1))
    record_act(
        settings,
        Act.ERASE,
        run.erasure_id,
        reason="requests to be erased",
        arguments={"people": len(run.requested), "files": len(run.files), "rows": run.rows},
        now=receipt.proven_at,
        run_id=run.erasure_id,
        table_version=(ERASURES.name, lake.version(ERASURES) or 0),
    )
    place = erasure_place(settings)
    data = json.dumps(asdict(receipt), default=datetime.isoformat, indent=2).encode()
    with durable(Step.ERASURE_DONE):
        place.write(f"{RECEIPTS}/{run.erasure_id}.json", data)
    done = [one.name for one in queued_erasures(settings) if one.user_id in run.tokens]
    place.delete([*done, f"{RUNS}/{run.erasure_id}.json"])


def receipt_file(settings: Settings, receipt: Receipt) -> str:
    """Return where the file of a receipt is."""
    return f"{erasure_place(settings).uri}/{RECEIPTS}/{receipt.erasure_id}.json"


def read_ids(path: Path) -> list[str]:
    """Return the ids of a file, one a line. Raises UsageError if it cannot be read or has none."""
    try:
        ids = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not ids:
        raise UsageError(f"{path} has no id", hint="one id a line")
    return ids
