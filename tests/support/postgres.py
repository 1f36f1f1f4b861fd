"""A Postgres of one test module: a new database cluster in a temporary folder, on a free port of the loopback address."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_SECONDS = 120


def _programs() -> Path:
    """Return the folder of Postgres' programs. Skips the test where no Postgres is installed."""
    found = [Path(shutil.which("initdb") or "/nonexistent").parent, *Path("/usr/lib/postgresql").glob("*/bin")]
    usable = [folder for folder in found if (folder / "initdb").exists() and (folder / "pg_ctl").exists()]
    if not usable:
        pytest.skip("Postgres is not installed (Debian: apt-get install postgresql)")
    return max(usable, key=lambda folder: folder.as_posix())


@dataclass(frozen=True)
class Postgres:
    """A server that runs. ``url`` has its password."""

    url: str
    password: str
    programs: Path
    folder: Path

    def control(self, *arguments: str) -> None:
        """Run pg_ctl on it: ``restart``, ``stop``."""
        _run(self.programs / "pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", *arguments, folder=self.folder)


def _run(program: Path, *arguments: str, folder: Path) -> None:
    # Postgres does not run as root: in a container of root's, Debian's user `postgres` runs it.
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    log = folder / "output"
    with log.open("ab") as output:
        done = subprocess.run(
            [program, *arguments],
            cwd=folder,
            stdout=output,
            stderr=output,
            timeout=_SECONDS,
            check=False,
            **user,  # type: ignore[call-overload]
        )
    assert done.returncode == 0, log.read_text()


@contextmanager
def throwaway_postgres() -> Iterator[Postgres]:
    """Run a Postgres within the context. Skips the test where none is installed."""
    programs = _programs()
    folder = Path(tempfile.mkdtemp(prefix="adtally-postgres-"))
    try:
        password = secrets.token_hex(12)
        (folder / "password").write_text(password)
        if os.getuid() == 0:
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres", "postgres")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        data = str(folder / "data")
        initdb = ("-D", data, "-U", "adtally", "-A", "scram-sha-256", "--pwfile", str(folder / "password"), "--no-sync")
        _run(programs / "initdb", *initdb, folder=folder)
        options = f"-c listen_addresses=127.0.0.1 -p {port} -c unix_socket_directories= -c fsync=off"
        _run(programs / "pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start", folder=folder)
        try:
            url = f"postgresql+psycopg2://adtally:{password}@127.0.0.1:{port}/postgres"
            yield Postgres(url, password, programs, folder)
        finally:
            _run(programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop", folder=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
