"""The processes of ``adtally up``: their commands, their environment, and where the code server listens."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import sys
import tempfile
from pathlib import Path

from orchestration.up.supervisor import Service
from spark_jobs.config import Settings
from spark_jobs.errors import MachineError, UsageError

HOST = "127.0.0.1"
CODE, WEB, DAEMON, INGEST = "code-server", "webserver", "daemon", "ingest"
LOCATION = "adtally"
WATCH_SECONDS = 5
"""How often the webserver and the daemon ask the code server whether it has new definitions. Dagster's default is 1."""

_NO_TELEMETRY = {
    "DAGSTER_DISABLE_TELEMETRY": "yes",
    "DO_NOT_TRACK": "1",
    "GX_ANALYTICS_ENABLED": "False",
    "DBT_SEND_ANONYMOUS_USAGE_STATS": "False",
}


def environment(settings: Settings, reports_url: str) -> dict[str, str]:
    """Return the environment of all processes: this one's, with absolute homes, and without modules of the working folder."""
    return {
        **os.environ,
        "PYTHONSAFEPATH": "1",
        **_NO_TELEMETRY,
        "ADTALLY_HOME": str(settings.home_path),
        "DAGSTER_HOME": str(settings.dagster_path),
        "ADTALLY_REPORTS_URL": settings.reports_url or reports_url,
        "PYTHONUNBUFFERED": "1",
        "FRESHNESS_DAEMON_INTERVAL_SECONDS": "300",  # the shortest window of a freshness policy is an hour
    }


def services(settings: Settings, *, port: int, socket_path: Path, trigger_seconds: float, ingest: bool) -> dict[str, Service]:
    """Return the services by name. One code server loads the definitions; the webserver and the daemon ask it."""
    python = (sys.executable, "-m")
    workspace = ("-w", str(write_workspace(settings, socket_path)))
    web = (*python, "orchestration.up.webserver", str(socket_path), "--host", HOST, "--port", str(port), *workspace)
    found = [
        Service(CODE, (*python, "orchestration.up.code_server", str(socket_path)), stop_seconds=20, asks_all=True),
        Service(WEB, web, stop_seconds=10),
        Service(DAEMON, (*python, "orchestration.up.daemon", "run", *workspace), stop_seconds=20),
    ]
    if ingest:  # it ends after the current batch
        command = (*python, "orchestration.cli", "ingest", "--continuous", "--trigger", f"{trigger_seconds:g}")
        found.append(Service(INGEST, command, stop_seconds=180))
    return {service.name: service for service in found}


def write_workspace(settings: Settings, socket_path: Path) -> Path:
    """Write the workspace file of the webserver and the daemon, which names the code server at the socket; return its path."""
    path = settings.dagster_path / "workspace.yaml"
    made = path.with_name(f".{path.name}.{os.getpid()}")
    made.write_text(f"load_from:\n  - grpc_server:\n      socket: {socket_path}\n      location_name: {LOCATION}\n", "utf-8")
    made.replace(path)
    return path


def socket_path(settings: Settings) -> Path:
    """Return the socket of this home's code server, in a folder that only this user can open.

    It is in the folder for temporary files, since a path below the home may be longer than the 100 bytes that a socket's name
    may have. Raises MachineError if others can open the folder.
    """
    name = hashlib.sha256(str(settings.home_path).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"adtally-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise MachineError(f"{folder} is not a folder of this user alone", hint="remove it")
    return folder / "code.sock"


def listens(path: Path) -> bool:
    """Return whether a process listens at the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def free_port(port: int) -> int:
    """Return the port if it is free on the loopback address, or a free one for 0. Raises UsageError if it is taken."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError as error:
            raise UsageError(
                f"port {port} of {HOST} cannot be had: {error.strerror}", hint="name another with --port; 0 takes a free one"
            ) from None
        return int(probe.getsockname()[1])
