"""The processes of ``adtally up``: their commands, their environment, and where the code server listens."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import stat
import sys
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path

from orchestration.up.supervisor import Service, Tell
from spark_jobs import disk
from spark_jobs.config import Settings
from spark_jobs.errors import MachineError, UsageError

HOST = "127.0.0.1"
CODE, WEB, CONSOLE, DAEMON, INGEST, MARTS = "code-server", "webserver", "console", "daemon", "ingest", "marts"
LOCATION = "adtally"
WATCH_SECONDS = 5
"""How often the webserver and the daemon ask the code server whether it has new definitions. Dagster's default is 1."""


def process_environment(settings: Settings, webserver: str, console: str) -> dict[str, str]:
    """Return the environment of all processes: this one's, with absolute homes, the two addresses, and without telemetry."""
    return {
        **os.environ,
        "PYTHONSAFEPATH": "1",  # no module comes from the working folder
        "PYTHONUNBUFFERED": "1",
        "DAGSTER_DISABLE_TELEMETRY": "yes",
        "DO_NOT_TRACK": "1",
        "GX_ANALYTICS_ENABLED": "False",
        "DBT_SEND_ANONYMOUS_USAGE_STATS": "False",
        "ADTALLY_HOME": str(settings.home_path),
        "DAGSTER_HOME": str(settings.dagster_path),
        "ADTALLY_REPORTS_URL": settings.reports_url or console,
        "ADTALLY_WEBSERVER_URL": settings.webserver_url or webserver,
        "FRESHNESS_DAEMON_INTERVAL_SECONDS": "300",  # the shortest window of a freshness policy is an hour
    }


def services(
    settings: Settings,
    environment: Mapping[str, str],
    *,
    port: int,
    console_port: int,
    code_socket: Path,
    trigger_seconds: float | None,
    ingest: bool,
    tell: Tell,
) -> dict[str, Service]:
    """Return the services by name. One code server loads the definitions; the webserver and the daemon ask it."""
    python = (sys.executable, "-m")
    workspace = settings.dagster_path / "workspace.yaml"
    listed = f"load_from:\n  - grpc_server:\n      socket: {code_socket}\n      location_name: {LOCATION}\n"
    disk.write_file(workspace, listed.encode())
    web = (*python, "orchestration.up.webserver", str(code_socket), "--host", HOST, "--port", str(port), "-w", str(workspace))
    service = partial(Service, logs=settings.home_path / "logs", environment=environment, tell=tell)
    made = [
        service(CODE, (*python, "orchestration.up.code_server", str(code_socket)), stop_seconds=20, asks_all=True),
        service(WEB, web, stop_seconds=10),
        service(CONSOLE, (*python, "orchestration.cli", "console", "--port", str(console_port)), stop_seconds=5),
        service(DAEMON, (*python, "orchestration.up.daemon", "run", "-w", str(workspace)), stop_seconds=20),
    ]
    if ingest:  # it ends after the current batch
        trigger = () if trigger_seconds is None else ("--trigger", f"{trigger_seconds:g}")
        command = (*python, "orchestration.cli", "ingest", "--wait", "--continuous", *trigger)
        made.append(service(INGEST, command, stop_seconds=180))
    if settings.marts_interval != timedelta(0):
        made.append(service(MARTS, (*python, "orchestration.cli", "marts", "build", "--continuous"), stop_seconds=20))
    return {each.name: each for each in made}


def socket_path(settings: Settings) -> Path:
    """Return the socket of this home's code server, in a folder that only this user can open. No other machine has the same path.

    It is in the folder for temporary files: a socket's path has 100 bytes at most, and one below the home may be longer. Raises
    MachineError if others can open the folder.
    """
    identity = f"{settings.home_path} {_machine_id(settings)}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"adtally-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise MachineError(f"{folder} is not a folder of this user alone", hint="remove it")
    return folder / "code.sock"


def _machine_id(settings: Settings) -> str:
    """Return an identifier of this home on this machine. A copy of the home on another machine has another one."""
    path = settings.dagster_path / "machine_id"
    if not path.exists():
        disk.write_file(path, secrets.token_hex(16).encode())
    return f"{path.read_text('utf-8')} {socket.gethostname()}"


def is_listening(path: Path) -> bool:
    """Return whether a process listens at the socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def free_port(port: int) -> int:
    """Return the port if it is free on the loopback address, or a free one for 0. Raises UsageError if it is taken."""
    try:
        with socket.create_server((HOST, port)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        hint = "name another with --port; 0 takes a free one"
        raise UsageError(f"port {port} of {HOST} cannot be had: {os.strerror(error.errno or 0)}", hint=hint) from None
