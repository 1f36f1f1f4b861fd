"""The small home of a history: its disk, its programs, its tables, and the model of what must be true of them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable
from obstore.store import LocalStore, ObjectStore, S3Store

from services.simulator.chaos import checks
from services.simulator.chaos.checks import Violation, require
from services.simulator.chaos.history import History
from services.simulator.chaos.model import Model
from services.simulator.chaos.oracle import Landed
from services.simulator.chaos.power import LoopDisk
from services.simulator.chaos.programs import Ended, HangError, Programs, clean_environment
from services.simulator.chaos.traffic import CAMPAIGNS, Shape, Traffic

FIRST_MS = 1_700_000_000_000
DISK_MEGABYTES = 192
_LEASE_SECONDS = "2"  # a killed command's lease is waited for
CRASH_VARIABLE = "ADTALLY_CRASH_AT"
_ERROR = re.compile(r"^adtally: error: .+$", re.MULTILINE)


@dataclass(frozen=True)
class StoreAddress:
    """A bucket, as ``s3://NAME``, and the variables by which its store is reached."""

    bucket: str
    variables: dict[str, str]


class Tables:
    """Reads Delta tables by delta-rs alone. A table that does not exist has no rows.

    ``lakehouse`` is an address, ``options`` are the variables by which a store is reached.
    """

    def __init__(self, lakehouse: str, options: dict[str, str] | None = None) -> None:
        self._lakehouse = lakehouse
        self._options = options or {}

    @cached_property
    def files(self) -> ObjectStore:
        """The files of the lakehouse."""
        if not self._options:
            return LocalStore(self._lakehouse.removeprefix("file://"))
        _, _, bucket, prefix = self._lakehouse.split("/", 3)
        names = {"access_key_id": "AWS_ACCESS_KEY_ID", "secret_access_key": "AWS_SECRET_ACCESS_KEY", "region": "AWS_REGION"}
        config: Any = {name: self._options[variable] for name, variable in names.items()}
        client: Any = {"allow_http": True}
        return S3Store(bucket, prefix=prefix, endpoint=self._options["AWS_ENDPOINT_URL"], config=config, client_options=client)

    def open(self, table: str) -> DeltaTable | None:
        """Return a table; None if it does not exist."""
        address = f"{self._lakehouse}/{table}"
        is_there = DeltaTable.is_deltatable(address, storage_options=self._options)
        return DeltaTable(address, storage_options=self._options) if is_there else None

    def dicts(self, table: str, columns: str) -> list[dict[str, Any]]:
        """Return rows as dicts; ``columns`` are names with commas between them. Times are microseconds since 1970."""
        found = self.open(table)
        if found is None:
            return []
        rows: pa.Table = found.to_pyarrow_table(columns=columns.replace(",", " ").split())
        for number, field in enumerate(rows.schema):
            if pa.types.is_timestamp(field.type):
                rows = rows.set_column(number, field.name, rows.column(number).cast(pa.timestamp("us", "UTC")).cast(pa.int64()))
            elif pa.types.is_decimal(field.type):
                whole = pa.array([None if value is None else int(value) for value in rows.column(number).to_pylist()])
                rows = rows.set_column(number, field.name, whole.cast(pa.int64()) if whole.null_count == len(whole) else whole)
        made: list[dict[str, Any]] = rows.to_pylist()
        return made

    def data_files(self, table: str) -> list[str]:
        """Return the data files of the newest version, as names in `files`, in a fixed order."""
        found = self.open(table)
        return [] if found is None else sorted(f"{table}/{path}" for path in pa.table(found.get_add_actions())["path"].to_pylist())


class World:
    """A home in ``folder`` and its model. ``disk`` is where the home is, if its power may be cut.

    ``store`` is where the lakehouse lies; None: in the home.
    """

    def __init__(
        self, history: History, folder: Path, programs: Programs, disk: LoopDisk | None, store: StoreAddress | None = None
    ) -> None:
        self.folder = folder
        self.programs = programs
        self.disk = disk
        self.home = (disk.path if disk is not None else folder) / "home"
        self.landing = folder / "landing"  # another machine's: it keeps what it has
        self.in_store = store is not None
        lakehouse = f"file://{self.home}/lakehouse" if store is None else f"{store.bucket}/{uuid.uuid4().hex}"
        self.tables = Tables(lakehouse, store.variables if store else None)
        self.model = Model(CAMPAIGNS, FIRST_MS)
        self.skipped: set[str] = set()  # faults that this machine cannot make
        self.struck: Counter[str] = Counter()  # faults that took effect, such as a kill before the command's end
        self.traffic = Traffic(Shape(history.seed, 200, 0, 0, 1, history.files_per_batch, history.split_bytes))
        self._environment = {
            **clean_environment(),
            "ADTALLY_HOME": str(self.home),
            "ADTALLY_LANDING": str(self.landing),
            "ADTALLY_SPARK_MASTER": "local[1]",
            "ADTALLY_MAX_FILES_PER_BATCH": str(history.files_per_batch),
            "ADTALLY_SPLIT_BYTES": str(history.split_bytes),
        }
        if store is not None:
            of_store = {"ADTALLY_LAKEHOUSE": lakehouse, "ADTALLY_LEASE_SECONDS": _LEASE_SECONDS}
            self._environment |= store.variables | of_store
        self.home.mkdir(parents=True)
        campaigns = self.landing / "campaigns" / "campaigns.csv"
        campaigns.parent.mkdir(parents=True)
        campaigns.write_text(CAMPAIGNS)

    def land(self, file: Landed) -> None:
        """Put a file into the landing folder by the protocol: write it elsewhere, then rename it."""
        target = self.landing / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden = target.with_name(f".{target.name}.tmp")
        hidden.write_bytes(file.stored)
        os.utime(hidden, ns=(file.modified_ms * 10**6, file.modified_ms * 10**6))
        hidden.rename(target)

    def start(self, *arguments: str, crash_at: str | None = None) -> str:
        """Start a command, which kills itself at ``crash_at``; return its name."""
        environment = {**self._environment, CRASH_VARIABLE: crash_at} if crash_at else self._environment
        return self.programs.start(arguments, environment)

    def wait(self, name: str, kill_after_ms: int | None = None) -> Ended:
        """Wait for a command. Raises Violation if it ends with anything but a result or one clear line."""
        try:
            ended = self.programs.wait(name, kill_after_ms)
        except HangError as error:
            raise Violation("command ends", str(error)) from None
        if not ended.was_killed:
            require(ended.status in (0, 1, 2), "exit status", f"{ended.words}: {ended.status}: {ended.said[-1500:]}")
            require("Traceback" not in ended.said, "clear error", f"{ended.words}: {ended.said[-3000:]}")
        return ended

    def run(self, *arguments: str) -> Ended:
        """Run a command that must succeed."""
        ended = self.wait(self.start(*arguments))
        require(ended.status == 0, "command succeeds", f"{ended.words}: {ended.status}: {ended.said[-1500:]}")
        return ended

    def closed_through(self) -> datetime | None:
        """Return up to which time hours are closed; None if none is, or if the tables cannot be read before an ingest has run."""
        ended = self.wait(self.start("hours", "list", "--json"))
        if ended.status != 0:
            require(self.model.is_torn, "command succeeds", f"{ended.words}: {ended.said[-1500:]}")
            return None
        closed = json.loads(ended.said)["closed_through"]
        return None if closed is None else datetime.fromisoformat(closed)

    def batches(self, stream: str) -> int:
        """Return how many batches the checkpoint of a stream has planned."""
        folder = self.home / "checkpoints" / stream / "offsets"
        numbers = [int(path.name) for path in folder.glob("[0-9]*")] if folder.exists() else []
        return max(numbers, default=-1) + 1

    @contextlib.contextmanager
    def nearly_full(self, kilobytes: int) -> Iterator[None]:
        """Leave only so many kilobytes on the disk during the block."""
        assert self.disk is not None
        ballast = self.disk.path / "ballast"
        _fill(ballast, kilobytes * 1024)
        try:
            yield
        finally:
            ballast.unlink()

    def lose(self, part: str) -> bool:
        """Delete a file or folder of the home. Return whether it was there."""
        path = self.home / part
        if not path.exists():
            return False
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        self.sync()
        return True

    def lose_machine(self) -> None:
        """Delete the home: what follows runs on another machine."""
        shutil.rmtree(self.home)
        self.home.mkdir()

    def sync(self) -> None:
        """Write what a step itself has changed through to the disk: a later power cut must not undo the fault."""
        if self.disk is not None:
            self.disk.sync()

    def failed_clearly(self, ended: Ended) -> None:
        """Raise Violation unless a command that failed said so in one line."""
        require(len(_ERROR.findall(ended.said)) == 1, "clear error", f"{ended.words}: {ended.said[-1500:]}")

    def check(self) -> None:
        """Check every invariant that must hold now."""
        _readable(self._check, torn=self.model.is_torn)

    def _check(self) -> None:
        model, tables = self.model, self.tables
        checks.check_conservation(tables)
        certain = model.books()
        if not model.has_read_all:
            checks.check_events(tables, model.books(waiting=True), marks=False, at_least=certain.events.keys())
            ids = {row["order_id"] for row in tables.dicts("orders", "order_id")}
            require(certain.orders.keys() <= ids, "orders", f"lost: {sorted(certain.orders.keys() - ids)[:4]}")
            return
        if model.needs_repair or model.is_correcting:
            checks.check_events(tables, certain, marks=False)
            return
        marks = model.is_reviewed
        checks.check_events(tables, certain, marks=marks)
        checks.check_orders(tables, certain)
        checks.check_refused(tables, certain, times=1 if model.readings == 1 else None)
        checks.check_ledger(tables, certain, marks=marks, offered=model.counts_offered)
        checks.check_minutes(tables, certain, marks=marks)
        checks.check_increments(tables, corrected=model.is_corrected)

    def check_settled(self, closed_through: datetime) -> None:
        """Check what holds once everything is reviewed, credited and billed."""
        self.check()
        checks.check_credits(self.tables, self.model.books())
        checks.check_bills(self.tables, self.model.books(), closed_through)


def _fill(ballast: Path, left: int) -> None:
    """Make a file that leaves about ``left`` bytes of its disk. The file system takes some of them for its own use."""
    size, chunk = 0, 2**24
    with ballast.open("wb") as file:
        while chunk >= 4096:
            found = os.statvfs(ballast.parent)
            try:
                if found.f_bfree * found.f_frsize - chunk < left:
                    raise OSError(errno.ENOSPC, "enough")
                os.posix_fallocate(file.fileno(), size, chunk)
                size += chunk
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                chunk //= 2


def _readable(check: Callable[[], None], *, torn: bool) -> None:
    """Run a check; a table that cannot be read is a violation, except after a power cut, until an ingest has run."""
    try:
        check()
    except Violation:
        raise
    except Exception as error:
        if not torn:
            raise Violation("readable", f"{type(error).__name__}: {error}") from error
