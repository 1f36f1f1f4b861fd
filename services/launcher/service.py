"""Starts and stops one service on this machine, with its own folder and ports."""

from __future__ import annotations

import contextlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template

import psutil
from filelock import FileLock, Timeout

from services.launcher.errors import ServiceBusyError, ServiceError, ServiceUsageError
from services.launcher.jars import CONF
from services.launcher.ports import choose, is_free
from services.launcher.processes import cause, find, lives, spawn, stop, wait_ready
from services.launcher.state import Recorded, State, read_state, write_state

Progress = Callable[[str], None]
BUSY_SECONDS = 300.0


def silent(_line: str) -> None:
    """Ignore a line of progress."""


@dataclass(frozen=True)
class Status:
    """The state of a service. ``problem`` says why a service that should run is not usable.

    ``addresses`` are by use, ``processes`` are pids by role, ``holds`` are the user's topics or tables with their sizes.
    """

    service: str
    version: str
    running: bool
    problem: str | None
    addresses: dict[str, str]
    processes: dict[str, int]
    folder: str
    holds: dict[str, int]


@dataclass(frozen=True)
class Program:
    """The executable of a service, and the arguments that stand before those of a role."""

    executable: Path
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Role:
    """One of a service's processes: its arguments, the options of its Java, and how long it may take to end."""

    name: str
    main: tuple[str, ...]
    options: tuple[str, ...]
    stop_seconds: float


class Service(ABC):
    """A service under ``root/<name>``: ``state.json``, ``conf/``, ``data/`` and ``logs/``.

    With ``ends_with_parent`` (for tests) no process outlives the thread that starts it, and all are killed at the end.
    """

    name: str
    role_names: tuple[str, ...]
    port_uses: tuple[str, ...]
    ready_seconds: float
    version: str
    warning: str | None = None  # printed on every start
    ports_are_kept = False  # True if the data depends on the ports, so that these cannot change
    mark_is_last = False  # True if the program takes the mark only as its last argument

    def __init__(self, root: Path, *, ends_with_parent: bool = False) -> None:
        self.folder = root.expanduser().absolute() / self.name
        self.data, self.logs = self.folder / "data", self.folder / "logs"
        self._conf, self._state_path = self.folder / "conf", self.folder / "state.json"
        self._ends_with_parent = ends_with_parent

    @abstractmethod
    def program(self, progress: Progress) -> Program:
        """Return the program, after fetching and checking its files. Raises MachineError if the machine lacks it."""

    @abstractmethod
    def roles(self, ports: dict[str, int]) -> list[Role]:
        """Return the processes in the order of their start."""

    @abstractmethod
    def probe(self, role: str, ports: dict[str, int]) -> str | None:
        """Return None if a process of this role works (it answered a real query), else what is missing."""

    @abstractmethod
    def addresses(self, ports: dict[str, int]) -> dict[str, str]:
        """Return the addresses for clients, by use."""

    @abstractmethod
    def holds(self, ports: dict[str, int]) -> dict[str, int]:
        """Return the user's topics with their partitions, or tables with their rows."""

    def arguments(self, program: Program, role: Role) -> list[str]:
        """Return the arguments of a process."""
        return [*program.arguments, *role.main]

    def secrets(self, program: Program, ports: dict[str, int]) -> dict[str, str]:
        """Return what the configuration needs beside ports and data; made once."""
        return {}

    def prepare(self, program: Program) -> None:  # noqa: B027
        """Create what the first process needs before it starts."""

    def settle(self, ports: dict[str, int], progress: Progress) -> None:  # noqa: B027
        """Complete the start once the service is ready."""

    def clear(self, ports: dict[str, int]) -> None:  # noqa: B027
        """Delete what ended processes leave outside the folder."""

    def running_addresses(self) -> dict[str, str]:
        """Return the addresses for clients. Raises ServiceError unless the service runs."""
        addresses = self.status().addresses
        if not addresses:
            raise ServiceError(f"{self.name.capitalize()} does not run", hint=f"start it: `adtally services {self.name} up`")
        return addresses

    def up(self, progress: Progress = silent, *, fresh: bool = False, wanted_ports: dict[str, int] | None = None) -> Status:
        """Start the service unless it runs. With ``fresh`` delete its data first; it must not run then.

        Raises ServiceError if it does not become ready (its processes are then stopped), ServiceUsageError if a port is taken,
        MachineError if a jar differs from the lock, ServiceBusyError if another process starts or stops the service.
        """
        with self._locked():
            state = read_state(self._state_path)
            running = self._running()
            if state and sorted(role for role, _ in running) == sorted(self.role_names):
                self._refuse_changes(state, fresh, wanted_ports)
                return self._find_running(state, running, progress)
            self._end(running, progress)
            if state and state.processes and not running:
                pids = ", ".join(str(one.pid) for one in state.processes.values())
                progress(f"{self.name} was not stopped but ended by itself (process {pids}); starting it again")
            program = self.program(progress)
            if fresh and self.data.exists():
                shutil.rmtree(self.data)
            self.data.mkdir(parents=True, exist_ok=True)
            state = State(self.version, self._ports(state, wanted_ports or {}, progress))
            write_state(self._state_path, state)
            self._start(state, program, progress)
            return self.status()

    def down(self, progress: Progress = silent) -> bool:
        """Stop the service, the newest process first; kill a process that does not end in time. Data and ports stay.

        Returns whether anything ran.
        """
        if not self.folder.exists():
            return False
        with self._locked():
            running = self._running()
            self._end(running, progress)
            with contextlib.suppress(ServiceError):  # a broken state file must not keep processes running
                if (state := read_state(self._state_path)) is not None:
                    write_state(self._state_path, State(state.version, state.ports))
                    self.clear(state.ports)
            return bool(running)

    def status(self) -> Status:
        """Return the state of the service, from its processes and a real query."""
        state = read_state(self._state_path)
        running = self._running()
        pids = {role: process.pid for role, process in running}
        ports = state.ports if state else {}
        problem = None
        if running and state:
            roles = self.roles(ports)
            gone = [role.name for role in roles if role.name not in pids]
            if gone:
                problem = f"{' and '.join(gone)} not running"
            else:
                asked = ((role.name, self.probe(role.name, ports)) for role in roles)
                problem = next((f"{role}: {missing}" for role, missing in asked if missing), None)
        elif running:
            problem = f"{self._state_path} is missing"
        elif state and state.processes:
            logs = (path(role) for role in reversed(self.role_names) for path in (self._log, self._output))
            problem = f"it was not stopped but ended by itself: {cause(*logs) or f'see {self.logs}'}"
        shown = self.addresses(ports) if running and state else {}
        holds = self.holds(ports) if running and not problem else {}
        return Status(self.name, self.version, bool(running), problem, shown, pids, str(self.folder), holds)

    def _running(self) -> list[tuple[str, psutil.Process]]:
        return [(role, process) for role in self.role_names for process in find(self.folder, role)]

    def _refuse_changes(self, state: State, fresh: bool, wanted_ports: dict[str, int] | None) -> None:
        stop_first = f"stop it first: `adtally services {self.name} down`"
        if fresh:
            raise ServiceUsageError(f"{self.name} runs on the data that would be deleted", hint=stop_first)
        for use, port in (wanted_ports or {}).items():
            if state.ports.get(use) != port:
                raise ServiceUsageError(f"{self.name} runs on port {state.ports.get(use)}, not {port}", hint=stop_first)

    def _find_running(self, state: State, running: list[tuple[str, psutil.Process]], progress: Progress) -> Status:
        progress(f"{self.name} runs already")
        for role, process in running:
            missing = wait_ready(process, lambda role=role: self.probe(role, state.ports), seconds=self.ready_seconds)  # type: ignore[misc]
            if missing:
                raise ServiceError(f"{self.name} runs, but {role}: {missing}", hint=f"logs in {self.logs}")
        self.settle(state.ports, progress)
        return self.status()

    def _ports(self, state: State | None, wanted: dict[str, int], progress: Progress) -> dict[str, int]:
        """Return the remembered ports that are free, and new ports in place of the others."""
        ports = {use: port for use, port in (state.ports if state else {}).items() if use in self.port_uses}
        for use, port in wanted.items():
            if not is_free(port):
                raise ServiceUsageError(f"port {port} is taken", hint="end what listens there, or name another with --port")
            ports[use] = port
        for use, port in list(ports.items()):
            if not is_free(port):
                if self.ports_are_kept and any(self.data.iterdir()):
                    raise ServiceUsageError(
                        f"port {port} ({use}) of {self.name} is taken, and its data is bound to it",
                        hint="end what listens there, or delete the data with --fresh",
                    )
                progress(f"port {port} ({use}) is taken by another program; choosing a new one")
                del ports[use]
        missing = [use for use in self.port_uses if use not in ports]
        return ports | dict(zip(missing, choose(len(missing), taken=set(ports.values())), strict=True))

    def _start(self, state: State, program: Program, progress: Progress) -> None:
        self._conf.mkdir(exist_ok=True)
        self._render(state.ports, self.secrets(program, state.ports))
        started: list[tuple[str, psutil.Process]] = []
        try:
            self.prepare(program)
            for role in self.roles(state.ports):
                progress(f"starting {role.name}")
                process = spawn(
                    program.executable,
                    self.folder,
                    role.name,
                    self.arguments(program, role),
                    output=self._output(role.name),
                    ends_with_parent=self._ends_with_parent,
                    mark_is_last=self.mark_is_last,
                )
                started.append((role.name, process))
                state.processes[role.name] = Recorded(process.pid, process.create_time())
                write_state(self._state_path, state)
                missing = wait_ready(process, lambda: self.probe(role.name, state.ports), seconds=self.ready_seconds)  # noqa: B023
                if missing:
                    found = cause(self._log(role.name), self._output(role.name))
                    problem = f"{role.name} did not start: {missing}{f': {found}' if found else ''}"
                    raise ServiceError(problem, hint=f"logs in {self.logs}")
            self.settle(state.ports, progress)
        except BaseException:  # Ctrl-C too: nothing else would stop the started processes
            self._end(started, progress, seconds=0)
            write_state(self._state_path, State(state.version, state.ports))
            self.clear(state.ports)
            raise

    def _end(self, running: list[tuple[str, psutil.Process]], progress: Progress, *, seconds: float | None = None) -> None:
        times = {role.name: role.stop_seconds for role in self.roles(dict.fromkeys(self.port_uses, 0))}
        for role, process in reversed(running):
            if not lives(process):
                continue
            allowed = 0.0 if self._ends_with_parent else times[role] if seconds is None else seconds
            progress(f"stopping {role}")
            if not stop(process, seconds=allowed) and allowed:
                progress(f"{role} did not end in {allowed:.0f} s and was killed")

    def _render(self, ports: dict[str, int], secrets: dict[str, str]) -> None:
        values = {use: str(port) for use, port in ports.items()} | {"data": str(self.data)} | secrets
        for source in sorted((CONF / self.name).iterdir()):
            if source.suffix in (".properties", ".conf", ".cfg", ".toml"):
                path = self._conf / source.name
                path.touch(0o600)
                path.chmod(0o600)  # it may hold secrets
                path.write_text(Template(source.read_text("utf-8")).substitute(values), "utf-8")

    def _log(self, role: str) -> Path:
        return self.logs / f"{role}.log"

    def _output(self, role: str) -> Path:
        return self.logs / f"{role}.out"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o700)  # configuration and logs may hold secrets
            with FileLock(self.folder / ".lock", timeout=BUSY_SECONDS):
                yield
        except Timeout:
            raise ServiceBusyError(f"another process has been starting or stopping {self.name} for too long") from None
