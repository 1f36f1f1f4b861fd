"""``adtally up``: checks the machine, starts all processes, keeps them running, and ends them in the right order."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from orchestration.alerts.notifier import AlertFile
from orchestration.up.graphql import Webserver, WebserverError
from orchestration.up.instance import take_reload_request, write_instance_config
from orchestration.up.services import (
    CODE,
    CONSOLE,
    DAEMON,
    HOST,
    INGEST,
    LOCATION,
    MARTS,
    WEB,
    free_port,
    is_listening,
    process_environment,
    services,
    socket_path,
)
from orchestration.up.storage_lock import check_storage
from orchestration.up.supervisor import Service, Tell, last_error
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, UsageError
from spark_jobs.failure import one_line
from spark_jobs.jars import ensure_jars
from spark_jobs.java import require_java
from spark_jobs.lake import locks
from spark_jobs.texts import counted

START_SECONDS = 180.0
END_SECONDS = 7.0
"""What has not ended by then is killed: no data are lost, and the next start makes interrupted runs again."""

_TURN_SECONDS = 0.2
_ASK_SECONDS = 2.5  # how long a question to the webserver may delay the end
_LOCK_SECONDS = 1.0  # between two looks at the lock of the ingest: each look takes it for a moment

Ready = Callable[[str, str], None]
"""Called with the addresses of the Dagster UI and of the console."""


class NotReadyError(AdtallyError):
    """A process did not become ready in time."""


class Stop:
    """Notes SIGINT, SIGTERM and SIGHUP. The first asks for the end, a second one for the end at once."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.asked = threading.Event()
        self._times: list[float] = []
        self._clock = clock

    def hurry(self) -> bool:
        """Return whether to kill what still runs: a second signal came, or END_SECONDS have passed since the first."""
        return len(self._times) > 1 or any(self._clock() >= asked_at + END_SECONDS for asked_at in self._times)

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Handle the signals while in the context."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it: `adtally up` then outlives its terminal
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._times.append(self._clock())
        self.asked.set()


def up(settings: Settings, *, port: int, trigger_seconds: float | None, ingest: bool, tell: Tell, ready: Ready) -> None:
    """Run Dagster, the continuous ingest and the builds of the marts until a signal asks for the end; leave no process.

    Calls ``tell`` at each change of state, and ``ready`` once the UI answers. Raises UsageError if the machine lacks something,
    BusyError if another ``adtally up`` runs on the home, and NotReadyError if Dagster does not start.
    """
    with locks.exclusive(settings, locks.UP):
        console_port = _console_port(settings, port)
        port = free_port(port)
        if ingest:
            require_java()
            ensure_jars(settings, progress=lambda line: tell(INGEST, line))
        write_instance_config(settings)
        check_storage(settings)
        with Stop().listening() as stop:
            _Up(settings, port, console_port, trigger_seconds, ingest, tell, stop).run(ready)


def _console_port(settings: Settings, webserver_port: int) -> int:
    """Return the console's port of the settings; a free one if it is taken, or if the webserver gets any free one too."""
    try:
        return free_port(settings.console_port if webserver_port else 0)
    except UsageError:
        return free_port(0)


class _Up:
    def __init__(
        self,
        settings: Settings,
        port: int,
        console_port: int,
        trigger_seconds: float | None,
        ingest: bool,
        tell: Tell,
        stop: Stop,
    ) -> None:
        self._settings, self._tell, self._stop = settings, tell, stop
        self._console = f"http://{HOST}:{console_port}"
        self._socket = socket_path(settings)
        self._webserver = Webserver(f"http://{HOST}:{port}", token=settings.webserver_token, timeout=_ASK_SECONDS)
        self._services = services(
            settings,
            process_environment(settings, self._webserver.address, self._console),
            port=port,
            console_port=console_port,
            code_socket=self._socket,
            trigger_seconds=trigger_seconds,
            ingest=ingest,
            tell=tell,
        )
        self._interrupted = settings.dagster_path / "interrupted_runs.json"
        self._thread: threading.Thread | None = None
        self._is_shown = False

    def run(self, ready: Ready) -> None:
        alerts = AlertFile(self._settings).reader()
        try:
            self._is_shown = self._start_ui()
            if self._is_shown:
                self._services[CONSOLE].start()
                ready(self._webserver.address, self._console)
                self._start_work()
                while not self._stop.asked.wait(_TURN_SECONDS):
                    self._check_services()
                    self._reload_on_request()
                    for alert in alerts():
                        self._tell("alert", f"{alert.title}: {one_line(alert.detail, 300)}; see {self._console}/{alert.runbook}")
        finally:
            self._end()

    def _check_services(self) -> None:
        for service in self._services.values():
            service.check()

    def _start_ui(self) -> bool:
        """Start the code server and the webserver, which import their modules at the same time; False if asked to stop."""
        code, web = self._services[CODE], self._services[WEB]
        code.start()
        web.start()
        if not self._wait(code, lambda: is_listening(self._socket)) or not self._wait(web, self._answers):
            return False
        if error := self._webserver.load_error():
            self._tell(CODE, f"the definitions cannot be loaded: {one_line(error)}")
        return True

    def _wait(self, service: Service, is_ready: Callable[[], bool]) -> bool:
        """Wait until a process is ready; return False if asked to stop. Raises NotReadyError."""
        deadline = time.monotonic() + START_SECONDS
        while not self._stop.asked.wait(_TURN_SECONDS):
            if is_ready():
                self._tell(service.name, "ready")
                return True
            self._check_services()
            if service.gave_up or time.monotonic() > deadline:
                reason = last_error(service.log) or "no error"
                raise NotReadyError(f"the {service.name} did not become ready: {reason}", hint=f"its log is {service.log}")
        return False

    def _answers(self) -> bool:
        with contextlib.suppress(WebserverError):
            self._webserver.load_error()
            return True
        return False

    def _start_work(self) -> None:
        """Start the rest, whose start takes more CPU than all before: the ingest with Spark, the daemon, the marts."""
        if ingest := self._services.get(INGEST):
            ingest.start()
            # The ingest takes its lock before a sensor of the daemon sees that nobody ingests, and starts another ingest.
            deadline = time.monotonic() + START_SECONDS
            while ingest.is_running and not locks.is_held(self._settings, locks.INGEST) and time.monotonic() < deadline:
                if self._stop.asked.wait(_LOCK_SECONDS):
                    return
        self._services[DAEMON].start()
        if marts := self._services.get(MARTS):
            marts.start()
        self._in_thread(self._run_again)

    def _in_thread(self, ask: Callable[[Webserver], None]) -> None:
        """Ask the webserver in a thread: a busy one takes its time, and this thread must notice signals."""
        patient = Webserver(self._webserver.address, token=self._settings.webserver_token, timeout=START_SECONDS)
        self._thread = threading.Thread(target=ask, args=[patient], daemon=True, name=ask.__name__)
        self._thread.start()

    def _run_again(self, webserver: Webserver) -> None:
        """Queue the runs again that the last stop cancelled, since nothing else asks for their work a second time."""
        self._queue_again(webserver, self._stop.asked.is_set)

    def _queue_again(self, webserver: Webserver, ends: Callable[[], bool]) -> None:
        while not ends() and (run_ids := self._read_interrupted()):
            run = f"run {run_ids[0]}, cancelled by the last stop, is"
            try:
                if again := webserver.run_again(run_ids[0]):
                    self._tell(DAEMON, f"{run} made again as {again}")
            except WebserverError as error:
                if ends():  # the next start makes it again
                    return
                self._tell(DAEMON, f"{run} perhaps not made again: {error}")
            self._interrupted.write_text(json.dumps(run_ids[1:]), "utf-8")

    def _read_interrupted(self) -> list[str]:
        try:
            return list(json.loads(self._interrupted.read_text("utf-8")))
        except (OSError, ValueError):
            return []

    def _reload_on_request(self) -> None:
        if (self._thread is None or not self._thread.is_alive()) and take_reload_request(self._settings):
            self._in_thread(self._reload)

    def _reload(self, webserver: Webserver) -> None:
        self._tell(CODE, "loading the definitions again: the lakehouse has hours before the first partition")
        try:
            webserver.reload(LOCATION)
        except WebserverError as error:
            self._tell(CODE, f"the definitions could not be loaded again: {error}")
        else:
            self._tell(CODE, "the definitions are loaded again")

    def _end(self) -> None:
        """End first what starts work, then the work, then what shows it. The ingest finishes its batch meanwhile."""
        hurry = self._stop.hurry
        if self._stop.asked.is_set() and not hurry():
            self._tell("adtally up", "ending, within 10 s; Ctrl-C again ends it at once")
        code, web, console, daemon = (self._services[name] for name in (CODE, WEB, CONSOLE, DAEMON))
        others = [self._services[name] for name in (INGEST, MARTS) if name in self._services]
        for service in (*others, daemon):
            service.ask_to_end()
        daemon.wait_ended(hurry)
        if self._is_shown:  # else there are no runs, and a webserver that is starting would answer nobody
            self._cancel_runs()
        for service in (web, code, console):
            service.ask_to_end()
        for service in (web, code, console, *others):
            service.wait_ended(hurry)

    def _cancel_runs(self) -> None:
        """Cancel the runs in progress and wait for it, so that they do not count as failed. Remember them for the next start."""
        asked = set(self._read_interrupted())  # those that this start has not made again yet
        running, problem = list[str](), ""
        while self._services[WEB].is_running and self._services[CODE].is_running and not self._stop.hurry():
            try:
                running = self._webserver.runs_of(str(self._socket))
                if not running:
                    if self._settings.dagster_storage is not None:  # another machine may carry them out, and this one not return
                        self._queue_again(self._webserver, self._stop.hurry)
                    return
                if fresh := [run for run in running if run not in asked]:
                    self._tell(DAEMON, f"cancelling {counted(len(fresh), 'run')} in progress")
                    asked.update(fresh)
                    self._interrupted.write_text(json.dumps(sorted(asked)), "utf-8")
                    self._webserver.terminate(fresh)
            except WebserverError as error:
                problem = f": {error}"
            time.sleep(_TURN_SECONDS)
        if running or problem:
            self._tell(DAEMON, f"runs in progress count as lost, and are made again{problem}")
