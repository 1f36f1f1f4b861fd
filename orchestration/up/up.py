"""The way of ``adtally up``: check the machine, start everything in turn, keep it running, end it in the right order."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from orchestration.alerts.notifier import AlertFile
from orchestration.up.graphql import Webserver, WebserverError
from orchestration.up.instance import take_reload_request, write_instance_config
from orchestration.up.reports import serving_reports
from orchestration.up.services import (
    CODE,
    DAEMON,
    HOST,
    INGEST,
    LOCATION,
    WEB,
    environment,
    free_port,
    listens,
    services,
    socket_path,
)
from orchestration.up.supervisor import NotReadyError, Supervisor, Tell, last_error
from spark_jobs.config import Settings
from spark_jobs.failure import one_line
from spark_jobs.jars import ensure_jars
from spark_jobs.java import require_java
from spark_jobs.lake.locks import UP, exclusive

_NAME = "adtally up"
START_SECONDS = 180.0
END_SECONDS = 7.0
"""What has not ended of itself by then is killed: nothing is lost, and what was cut off is made again."""

_TURN_SECONDS = 0.2
_ASK_SECONDS = 2.5  # that a question to the webserver may hold up the end

Ready = Callable[[str, str], None]
"""Told the addresses of the UI and of the reports."""


class Stop:
    """SIGINT, SIGTERM or SIGHUP: end all of it. A second one: at once."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.asked = threading.Event()
        self._times = 0
        self._clock = clock
        self._deadline: float | None = None

    def hurry(self) -> bool:
        """Whether it is to end now: whoever asked has asked again, or it took END_SECONDS."""
        return self._times > 1 or (self._deadline is not None and self._clock() >= self._deadline)

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Take the signals while in the context."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else nohup: it is to outlive its terminal
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._times += 1
        self._deadline = self._deadline or self._clock() + END_SECONDS
        self.asked.set()


def up(settings: Settings, *, port: int, trigger_seconds: float, ingest: bool, tell: Tell, ready: Ready) -> None:
    """Run Dagster and the continuous ingest until a signal asks for the end; leaves no process.

    ``tell`` is told each change of state, ``ready`` the addresses of the UI and of the
    reports once the UI answers. Raises UsageError for what the machine
    lacks, BusyError where another ``adtally up`` runs on the home, NotReadyError where Dagster does not come up: nothing is left
    running then.
    """
    with exclusive(settings, UP):
        port = free_port(port)
        if ingest:
            require_java()
            ensure_jars(settings, progress=lambda line: tell(INGEST, line))
        write_instance_config(settings)
        with Stop().listening() as stop, serving_reports(settings, port + 1 if port < 65535 else 0) as reports:
            _Up(settings, port, trigger_seconds, ingest, tell, stop, reports).run(ready)


class _Up:
    def __init__(
        self, settings: Settings, port: int, trigger_seconds: float, ingest: bool, tell: Tell, stop: Stop, reports: str
    ) -> None:
        self._settings, self._tell, self._stop, self._reports = settings, tell, stop, reports
        self._alerts = AlertFile(settings).reader()
        self._socket = socket_path(settings)
        self._services = services(settings, port=port, socket_path=self._socket, trigger_seconds=trigger_seconds, ingest=ingest)
        self._environment = environment(settings, reports)
        self._supervisor = Supervisor(settings.home_path / "logs", self._environment, tell)
        self._webserver = Webserver(f"http://{HOST}:{port}", token=settings.webserver_token, timeout=_ASK_SECONDS)
        self._interrupted = settings.dagster_path / "interrupted_runs.json"
        self._reloading: threading.Thread | None = None

    def run(self, ready: Ready) -> None:
        try:
            if self._start():
                ready(self._webserver.address, self._reports)
                # beside the loop: on a busy machine the webserver takes its time, and Ctrl-C is heard meanwhile
                threading.Thread(target=self._run_again, daemon=True, name="again").start()
                while not self._stop.asked.wait(_TURN_SECONDS):
                    self._supervisor.check()
                    self._reload_on_request()
                    self._tell_alerts()
        finally:
            self._end()

    def _start(self) -> bool:
        """Start all in turn; whether it was not asked to stop meanwhile."""
        if INGEST in self._services:  # it takes its lock first, so that no scheduled ingest gets in between
            self._supervisor.start(self._services[INGEST])
        # alone: two processes that make Dagster's databases at once number their version twice, and on those Dagster never starts
        self._settle_lost_runs()
        if self._stop.asked.is_set():
            return False
        self._supervisor.start(self._services[CODE])
        if not self._wait(CODE, lambda: listens(self._socket)):
            return False
        self._tell(CODE, "ready")
        for name in (WEB, DAEMON):
            self._supervisor.start(self._services[name])
        if not self._wait(WEB, self._answers):
            return False
        self._tell(WEB, "ready")
        error = self._webserver.load_error()
        if error:
            self._tell(CODE, f"the definitions cannot be loaded: {one_line(error)}")
        return True

    def _wait(self, name: str, ready: Callable[[], bool]) -> bool:
        """Wait until a process is ready; False where it is to stop. Raises NotReadyError."""
        deadline = time.monotonic() + START_SECONDS
        while not self._stop.asked.wait(_TURN_SECONDS):
            if ready():
                return True
            self._supervisor.check()
            if self._supervisor.gave_up(name) or time.monotonic() > deadline:
                log = self._supervisor.log(name)
                raise NotReadyError(f"the {name} did not become ready: {last_error(log) or 'no error'}", hint=f"its log is {log}")
        return False

    def _answers(self) -> bool:
        try:
            self._webserver.load_error()
        except WebserverError:
            return False
        return True

    def _settle_lost_runs(self) -> None:
        settling = subprocess.Popen(
            [sys.executable, "-m", "orchestration.up.lost_runs", str(self._socket)],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while True:
            try:
                out, error = settling.communicate(timeout=_TURN_SECONDS)
                break
            except subprocess.TimeoutExpired:
                if self._stop.asked.is_set():  # the next start settles them
                    settling.kill()
        if self._stop.asked.is_set():
            return
        if settling.returncode != 0:
            self._tell(DAEMON, f"runs of before could not be settled: {error.strip().splitlines()[-1:]}")
        for run_id in out.split():
            self._tell(DAEMON, f"run {run_id} was lost when adtally up was killed; it counts as failed")

    def _run_again(self) -> None:
        """Make the runs again that the last stop has cancelled: what they had to do is not asked for a second time."""
        webserver = Webserver(self._webserver.address, token=self._settings.webserver_token, timeout=START_SECONDS)
        while not self._stop.asked.is_set() and (run_ids := self._read_interrupted()):
            try:
                if again := webserver.run_again(run_ids[0]):
                    self._tell(DAEMON, f"run {run_ids[0]}, cancelled by the last stop, is made again as {again}")
            except WebserverError as error:
                if self._stop.asked.is_set():  # the next start makes it again
                    return
                self._tell(DAEMON, f"run {run_ids[0]}, cancelled by the last stop, is perhaps not made again: {error}")
            self._interrupted.write_text(json.dumps(run_ids[1:]), "utf-8")

    def _read_interrupted(self) -> list[str]:
        try:
            return list(json.loads(self._interrupted.read_text("utf-8")))
        except (OSError, ValueError):
            return []

    def _tell_alerts(self) -> None:
        for alert in self._alerts():
            self._tell("alert", f"{alert.title}: {one_line(alert.detail, 300)}; see {self._reports}/{alert.runbook}")

    def _reload_on_request(self) -> None:
        if (self._reloading is None or not self._reloading.is_alive()) and take_reload_request(self._settings):
            self._reloading = threading.Thread(target=self._reload, daemon=True, name="reload")
            self._reloading.start()

    def _reload(self) -> None:
        self._tell(CODE, "loading the definitions again: the lakehouse has hours before the first partition")
        try:
            Webserver(self._webserver.address, token=self._settings.webserver_token, timeout=START_SECONDS).reload(LOCATION)
        except WebserverError as error:
            self._tell(CODE, f"the definitions could not be loaded again: {error}")
        else:
            self._tell(CODE, "the definitions are loaded again")

    def _end(self) -> None:
        """End all of it: first what starts work, then the work, then what shows it. The ingest ends its batch meanwhile."""
        hurry = self._stop.hurry
        if self._stop.asked.is_set() and not hurry():
            self._tell(_NAME, "ending, within 10 s; Ctrl-C again ends it at once")
        self._supervisor.ask_to_end(INGEST)
        self._supervisor.ask_to_end(DAEMON)
        self._supervisor.wait_ended(DAEMON, hurry)
        self._end_runs()
        for name in (WEB, CODE):
            self._supervisor.ask_to_end(name)
        for name in (WEB, CODE, INGEST):
            self._supervisor.wait_ended(name, hurry)

    def _end_runs(self) -> None:
        """Ask the runs in progress to end and wait for it, so that they count as cancelled and not as lost."""
        asked = set(self._read_interrupted())  # what the start had not come to
        running, problem = list[str](), ""
        while self._supervisor.runs(WEB) and self._supervisor.runs(CODE) and not self._stop.hurry():
            try:
                running = self._webserver.runs_of(str(self._socket))
                if not running:
                    return
                if fresh := [run for run in running if run not in asked]:
                    self._tell(DAEMON, f"cancelling {len(fresh)} run{'' if len(fresh) == 1 else 's'} in progress")
                    asked.update(fresh)
                    self._interrupted.write_text(json.dumps(sorted(asked)), "utf-8")
                    self._webserver.terminate(fresh)
            except WebserverError as error:
                problem = f": {error}"
            time.sleep(_TURN_SECONDS)
        if running or problem:
            self._tell(DAEMON, f"runs in progress count as lost, and are made again{problem}")


def logs_path(settings: Settings) -> Path:
    """Folder of the logs of all processes."""
    return settings.home_path / "logs"
