"""Leases: the locks of a lakehouse in an object store. docs/architecture.md has the protocol.

A lease is one object, ``<lakehouse>/_adtally/leases/<name>.json``. It is taken, renewed and released by conditional puts, so of
several processes one wins. Its token grows with each holder and never decreases; the commits made under the lease carry it
(`fencing.py`).

Expiry compares no clocks of two machines. A waiter watches the object: if its tag has not changed for the holder's ``seconds``, by
the waiter's own clock, the holder has not renewed it and the waiter may take it over. A holder that could not renew its lease in
time does not trust it either: it renews it by a conditional put, which fails if somebody has taken the lease over.

Each put has a new nonce, so no two contents have one tag. If the outcome of a put is unknown, because the answer was lost, the
holder and the token in the object decide.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TypeVar

from filelock import Timeout

from spark_jobs.errors import LeaseLostError, StoreError, TableCorruptionError
from spark_jobs.lake.places import SharedObject

_FOLDER = "leases"
_EXPIRY = 1.1  # times a lease's seconds without a renewal: two clocks may run at slightly different speeds
_RENEWALS = 4  # within a lease's seconds
_LOOK_SECONDS = 1.0  # between two looks of a waiter at an object
_AWAY_SECONDS = 60.0  # how long a process waits for a store that does not answer
_END_SECONDS = 2.0
_SHORTEST_PAUSE = 0.1  # of the renewing thread, while the store does not answer
_DEAD_STATES = "ZX"
_STOPPED_STATES = "Tt"


def _clock() -> float:
    """Return seconds that no one sets, and that also pass while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Holder:
    """A process of a machine. ``boot`` and ``pids`` (its pid namespace) say where ``pid`` and ``started`` mean anything."""

    id: str
    host: str
    pid: int
    started: str
    boot: str
    pids: str

    @property
    def _is_local(self) -> bool:
        return bool(self.boot) and (self.boot, self.pids) == _this_machine()

    @property
    def has_ended(self) -> bool:
        """Whether the process has certainly ended: it ran on this machine."""
        return self._is_local and self._state is None

    @property
    def is_running(self) -> bool:
        """Whether the process certainly runs: it is on this machine, and not stopped."""
        return self._is_local and self._state not in (None, *_STOPPED_STATES)

    @property
    def _state(self) -> str | None:
        """The state of a local process, as /proc has it; None if it has ended."""
        found = _process(self.pid)
        return None if found is None or found[1] != self.started or found[0] in _DEAD_STATES else found[0]

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}"


def _process(pid: int) -> tuple[str, str] | None:
    """Return the state and the start time of a process; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]


@cache
def _this_machine() -> tuple[str, str]:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip(), str(os.stat("/proc/self/ns/pid").st_ino)
    return "", ""


@cache
def this_process() -> Holder:
    """Return this process as a holder."""
    found = _process(os.getpid())
    return Holder(uuid.uuid4().hex, socket.gethostname(), os.getpid(), found[1] if found else "", *_this_machine())


@dataclass(frozen=True)
class Record:
    """The content of a lease's object. ``since`` and ``command`` are for people: nothing decides by them.

    ``fenced`` False: the tables may still get a commit of an earlier holder, so whoever takes the lease fences them first.
    """

    holder: Holder
    token: int
    nonce: str
    seconds: float
    renewed: int
    released: bool
    fenced: bool
    since: str
    command: str

    @classmethod
    def parse(cls, data: bytes) -> Record:
        """Parse an object's bytes. Raises ValueError or TypeError if another program wrote them."""
        found = json.loads(data)
        return cls(**{**found, "holder": Holder(**found["holder"])})

    def encode(self) -> bytes:
        """Return the bytes of the object."""
        return json.dumps(asdict(self), indent=1).encode()

    def __str__(self) -> str:
        return f"{self.holder}, since {self.since}"


_NOBODY = Record(Holder("", "", 0, "", "", ""), 0, "", 0.0, 0, released=True, fenced=True, since="", command="")


T = TypeVar("T")


class Lease:
    """One lease of a lakehouse, as this process sees it. One thread at a time can hold it; the whole process acts under it.

    ``fence(lease)`` makes every further commit of earlier holders impossible. It runs before `acquire` returns, if the last holder
    has not released the lease.
    """

    def __init__(self, lakehouse: str, state: str, name: str, seconds: float, fence: Callable[[Lease], None]) -> None:
        self.lakehouse, self.name = lakehouse, name
        self._seconds, self._fence = seconds, fence
        self._object = SharedObject(leases_folder(state), f"{name}.json", max(0.5, seconds / _RENEWALS))
        self._owner = threading.Lock()  # held by the thread that holds the lease, or tries to take it
        self._puts = threading.Lock()  # held during a put and the changes of the fields below
        self._mine: Record | None = None
        self._tag = ""
        self._valid_until = 0.0  # of `_clock`
        self._lost: LeaseLostError | None = None
        self._is_dirty = False
        self._released: tuple[Record, str] | None = None  # what this process wrote last: nobody may have taken it since
        self._seen: tuple[str, float] = ("", 0.0)  # the tag that this process saw last as a waiter, and since when
        self._looked = 0.0

    def __str__(self) -> str:
        return f"{self.name} of {self.lakehouse}"

    @property
    def token(self) -> int | None:
        """The fencing token; None if a thread of this process has released the lease.

        Raises LeaseLostError if another process has taken it over.
        """
        record, lost = self._mine, self._lost  # in this order: `lose` sets them the other way around
        if record is None and lost is not None:
            raise lost
        return None if record is None else record.token

    @property
    def is_held(self) -> bool:
        """Whether this process acts under the lease: it has taken it and not released it, even if it has lost it meanwhile."""
        return self._mine is not None or self._lost is not None

    @property
    def renew_at(self) -> float | None:
        """The time of `_clock` at which to renew the lease; None if it is not held."""
        return None if self._mine is None else self._valid_until - self._seconds * (1 - 1 / _RENEWALS)

    def acquire(self, timeout: float) -> None:
        """Take the lease within ``timeout`` seconds; a negative one waits without end.

        0 waits until it is clear whether the holder lives: no time on its own machine, else at most for the holder's ``seconds``.
        Raises filelock's Timeout if another process or thread holds it, StoreError if the store does not answer for a minute.
        """
        if not self._owner.acquire(timeout=-1 if timeout < 0 else timeout):
            raise Timeout(str(self))
        try:
            if self._take(timeout):
                self._fence(self)
                self._patiently(lambda: self._renew(fenced=True))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Release the lease. If the store does not answer, others wait until it expires."""
        ends = _clock() + min(_AWAY_SECONDS, self._seconds)
        try:
            with self._puts:
                record, self._mine, self._lost = self._mine, None, None
                if record is not None:
                    done = replace(record, released=True, fenced=record.fenced and not self._is_dirty)
                    with suppress(StoreError):
                        self._released = self._patiently(lambda: self._put(done, self._tag), until=ends)
        finally:
            self._owner.release()
            _renewer.wake()

    def check(self, *, renews: bool = True) -> None:
        """Return if this process holds the lease. Renews it if it may have expired; with ``renews`` False asks nobody.

        Raises LeaseLostError if another process has taken it over, StoreError if the store does not answer for a minute.
        """
        if self._lost is not None:
            raise self._lost
        if renews and self._mine is not None and _clock() >= self._valid_until:
            self._patiently(self._renew)

    def lose(self, by: str) -> LeaseLostError:
        """Record that another process has the lease; return the error that says so."""
        self._lost = LeaseLostError(
            f"the lease {self} was taken over by {by}, because this process had not renewed it for {self._seconds:g} s; "
            f"noticed at {datetime.now(UTC):%H:%M:%S} UTC, and nothing was committed since",
            hint="the new holder does what was not committed; docs/object-store.md",
        )
        self._mine = None
        return self._lost

    def mark_dirty(self) -> None:
        """Make the next holder fence the tables, because a commit of this process may still take effect."""
        self._is_dirty = True

    def describe(self) -> str:
        """Return who holds the lease, for people; empty if nobody does."""
        with suppress(StoreError):
            found = self._read()
            return "" if found is None or found[0].released else str(found[0])
        return ""

    def is_taken(self) -> bool:
        """Return whether a living process holds the lease. Takes as long as `acquire` with 0."""
        if self.is_held:
            return True
        first: str | None = None
        while (found := self._patiently(self._read)) is not None and self._blocks(*found):
            first = first or found[1]
            if found[0].holder.is_running or found[1] != first:
                return True
            time.sleep(self._poll_seconds)
        return False

    def renew_in_background(self) -> None:
        """Renew the lease. Ignores a store that does not answer; `check` raises if the lease is lost."""
        with suppress(StoreError, LeaseLostError):
            self._renew()

    @property
    def _poll_seconds(self) -> float:
        return min(_LOOK_SECONDS, self._seconds / 8)

    def _take(self, timeout: float) -> bool:
        """Take the lease; return whether the tables must be fenced."""
        released, self._released = self._released, None
        if released is not None and self._try(*released):  # one request, if nobody else has had the lease
            return not released[0].fenced
        ends = math.inf if timeout <= 0 else _clock() + timeout
        first: str | None = None
        while True:
            if _clock() >= self._looked + self._poll_seconds:
                record, tag = self._patiently(self._read) or (_NOBODY, "")
                if not self._blocks(record, tag):
                    if self._try(record, tag):
                        return not (record.released and record.fenced)
                    continue  # another process was faster
                self._looked = _clock()
                if timeout == 0:
                    if record.holder.is_running or tag != (first or tag):
                        raise Timeout(str(self))
                    if first is None:
                        logging.getLogger("adtally").warning(
                            "adtally: the lease %s has %s: waiting up to %.0f s to see whether that process still runs",
                            self,
                            record,
                            record.seconds * _EXPIRY,
                        )
                    first = first or tag
            left = ends - _clock()
            if left <= 0:
                raise Timeout(str(self))
            time.sleep(min(self._poll_seconds, left))

    def _read(self) -> tuple[Record, str] | None:
        found = self._object.read()
        try:
            return None if found is None else (Record.parse(found[0]), found[1])
        except (ValueError, TypeError, KeyError) as error:
            raise TableCorruptionError(f"{self._object} is not a lease", hint="another program wrote it") from error

    def _blocks(self, record: Record, tag: str) -> bool:
        """Return whether somebody may hold the lease: it is not released, its process may run, and it has not expired."""
        if record.released or record.holder.has_ended or record.holder.id == this_process().id:  # the last: a release that failed
            return False
        if self._seen[0] != tag:
            self._seen = (tag, _clock())
        return _clock() < self._seen[1] + record.seconds * _EXPIRY

    def _try(self, record: Record, tag: str) -> bool:
        """Take the lease that ``record`` describes; return False if another process was faster."""
        mine = Record(
            this_process(),
            record.token + 1,
            "",
            self._seconds,
            0,
            released=False,
            fenced=record.released and record.fenced,
            since=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
        )
        with self._puts:
            self._is_dirty = False
            if self._patiently(lambda: self._write(mine, tag)):
                _renewer.wake()
                return True
        return False

    def _renew(self, *, fenced: bool | None = None) -> None:
        with self._puts:
            record = self._mine
            if record is None:
                if self._lost is not None:
                    raise self._lost
                return
            changed = replace(record, renewed=record.renewed + 1, fenced=record.fenced if fenced is None else fenced)
            if not self._write(changed, self._tag):
                found = self._read()
                raise self.lose("somebody who has deleted it" if found is None else str(found[0]))

    def _write(self, record: Record, tag: str) -> bool:
        """Write a held lease's record; return False if it is another process's. `_puts` is held."""
        began = _clock()
        new = self._put(record, tag)
        if new is None:
            return False
        self._mine, self._tag = new
        self._valid_until = began + self._seconds
        return True

    def _put(self, record: Record, tag: str) -> tuple[Record, str] | None:
        """Write a record in place of the object with ``tag``; empty: of none. Returns None if another process was faster.

        An earlier put of this process, whose outcome it did not learn, may have changed the tag: the object then has this holder
        and this token, and is replaced. Raises StoreError if the store does not answer.
        """
        while True:
            record = replace(record, nonce=uuid.uuid4().hex)
            new = self._object.write(record.encode(), tag)
            if new is not None:
                return record, new
            found = self._read()
            if found is None or (found[0].holder.id, found[0].token) != (record.holder.id, record.token):
                return None
            if found[0].nonce == record.nonce:  # this put took effect, though the store has answered that the tag was another
                return found
            tag = found[1]

    def _patiently(self, call: Callable[[], T], *, until: float | None = None) -> T:
        """Call again, for a minute, while the store does not answer."""
        ends = _clock() + _AWAY_SECONDS if until is None else until
        while True:
            try:
                return call()
            except StoreError as error:
                if _clock() >= ends or not error.retryable:
                    raise
                time.sleep(self._poll_seconds)


class _Renewer:
    """Renews all leases that this process holds, in one thread, which runs while it holds any."""

    def __init__(self) -> None:
        self.leases: dict[tuple[str, str], Lease] = {}
        self.guard = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._ends = False

    def wake(self) -> None:
        """Note that a lease was taken or released."""
        with self.guard:
            if self._thread is None and self._times():
                self._thread = threading.Thread(target=self._run, daemon=True, name="leases")
                self._thread.start()
        self._wake.set()

    def end(self) -> None:
        """Wait for the thread before the interpreter ends: a thread that then returns from obstore aborts the process."""
        self._ends, thread = True, self._thread
        self._wake.set()
        if thread is not None:
            thread.join(_END_SECONDS)

    def _times(self) -> list[float]:
        return [at for lease in list(self.leases.values()) if (at := lease.renew_at) is not None]

    def _run(self) -> None:
        while True:
            self._wake.clear()
            for lease in list(self.leases.values()):
                if (at := lease.renew_at) is not None and _clock() >= at:
                    lease.renew_in_background()
            with self.guard:
                times = self._times()
                if not times or self._ends:
                    self._thread = None
                    return
            self._wake.wait(max(_SHORTEST_PAUSE, min(times) - _clock()))


_renewer = _Renewer()
atexit.register(_renewer.end)


def leases_folder(state: str) -> str:
    """Return where the leases of a lakehouse are, whose state is in ``state``."""
    return f"{state}/{_FOLDER}"


def lease_of(lakehouse: str, state: str, name: str, seconds: float, fence: Callable[[Lease], None]) -> Lease:
    """Return the lease of this process: all threads get the same object."""
    with _renewer.guard:
        return _renewer.leases.setdefault((state, name), Lease(lakehouse, state, name, seconds, fence))


def held_leases(lakehouse: str) -> list[Lease]:
    """Return the leases of a lakehouse under which this process acts."""
    return [lease for lease in list(_renewer.leases.values()) if lease.lakehouse == lakehouse and lease.is_held]
