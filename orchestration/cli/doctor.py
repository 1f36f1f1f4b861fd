"""The commands ``adtally doctor`` and ``adtally version``: what the machine must have, and what it has."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from orchestration.cli.context import Call
from orchestration.cli.options import Json, Panel, examples
from orchestration.cli.output import show
from spark_jobs.errors import AdtallyError, MachineError

if TYPE_CHECKING:
    from spark_jobs.config import Settings
    from spark_jobs.ingest.kafka.config import KafkaCluster

app = typer.Typer()

MIN_FREE_BYTES = 2 * 1024**3
_LOOPBACK = "127.0.0.1"
_SYNCS = 7
_SLOW_SYNC_SECONDS = 0.1


@dataclass(frozen=True)
class Check:
    """The result of one check. ``detail`` says what it found, or what is wrong and what to do."""

    name: str
    ok: bool
    detail: str


@app.command(rich_help_panel=Panel.TRY, epilog=examples("adtally doctor", "adtally doctor --fix", "adtally doctor --json"))
def doctor(
    context: typer.Context,
    fix: Annotated[bool, typer.Option("--fix", help="Download what is missing: the jars, DuckDB's extension.")] = False,
    as_json: Json = False,
) -> None:
    """Check the machine: settings, Java, jars, DuckDB's extension, home, lakehouse, Spark, locale, ports, disk space, fsync.

    Exit status 2 if one fails.
    """
    checks = examine(context.ensure_object(Call).home, fix=fix)
    is_ok = all(check.ok for check in checks)
    marks = {True: ("ok     ", "green"), False: ("missing", "red")}
    lines = (Text.assemble(marks[check.ok], f" {check.name}: {check.detail}") for check in checks)
    show({"ok": is_ok, "checks": checks}, lines, as_json=as_json)
    if not is_ok:
        raise typer.Exit(2)


@app.command(rich_help_panel=Panel.TRY, epilog=examples("adtally version", "adtally version --json"))
def version(as_json: Json = False) -> None:
    """Show the versions of adtally and of the packages that it depends on."""
    from importlib.metadata import version as installed

    names = ("adtally", "pyspark", "delta-spark", "duckdb", "dbt-core", "dbt-duckdb", "dagster", "great-expectations")
    found = {name: installed(name) for name in names} | {"python": sys.version.split()[0]}
    show(found, (f"{name} {number}" for name, number in found.items()), as_json=as_json)


def examine(home: Path | None, *, fix: bool = False) -> list[Check]:
    """Run all checks and return them in a fixed order: one fault does not hide the next. ``fix``: download missing jars."""
    from spark_jobs.config import load_settings

    try:
        settings = load_settings(home=home)
    except AdtallyError as error:
        return [Check("settings", False, str(error)), _check("java", _java)]
    return [
        Check("settings", True, f"home {settings.home_path}, tables in {settings.lakehouse_uri}"),
        Check("python", True, sys.version.split()[0]),
        _check("java", _java),
        _check("jars", lambda: _jars(settings, fix)),
        _check("duckdb extension", lambda: _extension(settings)),
        _check("home", lambda: _writable(settings)),
        _check("lakehouse", lambda: _lakehouse(settings)),
        _check("spark", lambda: _spark(settings)),
        _check("locale", _locale),
        _check("ports", lambda: _ports(settings.webserver_port)),
        _check("landing", lambda: _landing(settings)),
        *_kafka(settings),
        _check("disk", lambda: _disk(settings.home_path)),
        _check("fsync", lambda: _fsync(settings.home_path)),
    ]


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (AdtallyError, OSError) as error:
        return Check(name, False, str(error))


def _java() -> str:
    from spark_jobs.java import require_java

    java = require_java()
    return f"Java {java.major} at {java.executable}"


def _jars(settings: Settings, fix: bool) -> str:
    from spark_jobs.jars import ensure_jars, jars_are_cached

    if not fix and not jars_are_cached(settings):
        raise MachineError("not resolved yet", hint="`adtally doctor --fix` does it; so does the first ingest")
    jars = ensure_jars(settings, progress=lambda line: print(line, file=sys.stderr, flush=True))
    return f"{len(jars)} as pinned, in {jars[0].parent}"


def _extension(settings: Settings) -> str:
    import duckdb

    from spark_jobs.lake.duck import connect_delta

    connect_delta(lakehouse=settings.lakehouse_uri).close()
    return f"delta for DuckDB {duckdb.__version__}"


def _writable(settings: Settings) -> str:
    home = settings.home_path
    place, hint = nearest(home), "set ADTALLY_HOME to another place"
    if not place.is_dir():
        raise MachineError(f"{place} is not a folder", hint=hint)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise MachineError(f"{place} cannot be written: {error.strerror}", hint=hint) from None
    folders = [settings.checkpoints_path, settings.scratch_path, settings.key_index_path]
    for folder in folders:  # an earlier run by another user may have made some
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise MachineError(f"{folder} cannot be written by this user", hint="give it to the user that ingests")
    if not home.exists():
        return f"{home} will be made"
    is_open = home.stat().st_mode & 0o077
    return f"{home} can be written" + (f", and other users of this machine may read it: chmod 700 {home}" if is_open else "")


def _lakehouse(settings: Settings) -> str:
    from spark_jobs.lake.places import open_place

    return open_place(settings.lakehouse_uri).check()


def _landing(settings: Settings) -> str:
    from spark_jobs.lake.landing_view import refresh_landing

    refresh_landing(settings)  # raises if its store cannot be listed
    folder = settings.landing_path
    if not folder.exists():
        return f"{folder} is not there yet: nothing to ingest"
    if not os.access(folder, os.R_OK | os.X_OK):
        raise MachineError(f"{folder} cannot be read", hint="give this user the right to read it")
    return settings.landing_uri


def _kafka(settings: Settings) -> list[Check]:
    """Check each cluster, or return what is wrong with kafka.toml; the message has no value of the file, which may be secret."""
    from spark_jobs.ingest.kafka.config import read_kafka

    try:
        kafka = read_kafka(settings)
    except AdtallyError as error:
        return [Check("kafka", False, str(error))]
    clusters = {cluster.name: cluster for cluster in kafka.consumed}
    if kafka.publish is not None:
        clusters.setdefault(kafka.publish.cluster.name, kafka.publish.cluster)
    return [_check(f"kafka {name}", partial(_ask_cluster, cluster)) for name, cluster in clusters.items()]


def _ask_cluster(cluster: KafkaCluster) -> str:
    """Check that a cluster answers and has the topics to ingest. `adtally publish` makes its own topics."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    from spark_jobs.errors import KafkaError
    from spark_jobs.ingest.kafka.gaps import read_topic
    from spark_jobs.ingest.kafka.topics import ASK_SECONDS
    from spark_jobs.lake.tables import STREAMS

    servers = cluster.bootstrap_servers
    try:
        AdminClient({"log_level": "0", **cluster.client_options()}).list_topics(timeout=ASK_SECONDS)
    except KafkaException as error:
        message = f"cluster {cluster.name} at {servers} does not answer: {error.args[0].str()}"
        raise KafkaError(message, hint="is the broker up?") from None
    topics = [read_topic(cluster, cluster.topic(stream), ASK_SECONDS) for stream in STREAMS] if cluster.consume else []
    parts = ", ".join(f"{topic.topic} ({len(topic.latest)} partitions)" for topic in topics)
    return f"{servers} has {parts}" if parts else f"{servers} answers"


def _spark(settings: Settings) -> str:
    """Return which Spark the ingest would run, and name variables of the environment that choose another Spark or Python."""
    import pyspark

    from spark_jobs.session import FOREIGN_VARIABLES, is_one_machine

    ours = f"Spark {pyspark.__version__}"
    named = {name: value for name in FOREIGN_VARIABLES if (value := os.environ.get(name))}
    if not named:
        return ours
    listed = ", ".join(f"{name}={value}" for name, value in named.items())
    if is_one_machine(settings.spark_master):
        return f"{ours}; on one machine these are not used: {listed}"
    for name, value in named.items():
        if name.startswith("SPARK") and not Path(value).is_dir():
            raise MachineError(f"{name} is {value}, which is no folder", hint=f"unset {name}, or point it to {ours}")
        if name.startswith("PYSPARK_PYTHON") and shutil.which(value) is None:
            raise MachineError(f"{name} is {value}, which is no program", hint=f"unset {name}, or point it to this Python")
    return f"{ours}; the cluster is reached with {listed}"


def _locale() -> str:
    names = sys.getfilesystemencoding()
    if names.lower().replace("-", "") != "utf8":
        raise MachineError(f"file names are {names} in this locale, not UTF-8", hint="set LC_ALL=C.UTF-8")
    chosen = next((f"{name}={os.environ[name]}" for name in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), "none set")
    return f"{chosen}, file names are UTF-8"


def _ports(port: int) -> str:
    """Check loopback, which Spark needs, and the port of the UI, which only `adtally up` needs."""
    try:
        with socket.create_server((_LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        raise MachineError(f"no connection on {_LOOPBACK}: {error}", hint="Spark needs it, and a free port there") from None
    try:
        socket.create_server((_LOOPBACK, port)).close()
    except OSError:
        return f"{_LOOPBACK} works; {port} is taken: `adtally up --port 0` takes a free one"
    return f"{_LOOPBACK} works"


def _fsync(home: Path) -> str:
    """Measure how long the disk takes to sync a small file. Each batch waits for dozens of syncs."""
    taken = []
    folder = next(place for place in (home, *home.parents) if place.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(_SYNCS):
                file.write(b"x" * 4096)
                file.flush()
                started = time.monotonic()
                os.fsync(file.fileno())
                taken.append(time.monotonic() - started)
    except OSError as error:
        raise MachineError(f"{folder} cannot be synced: {error.strerror}", hint="set ADTALLY_HOME to another disk") from None
    median = sorted(taken)[len(taken) // 2]
    slow = f"; slow: a batch waits {median * 50:.0f} s for the disk" if median > _SLOW_SYNC_SECONDS else ""
    return f"{median * 1000:.1f} ms a file{slow}"


def _disk(home: Path) -> str:
    free = shutil.disk_usage(nearest(home)).free
    if free < MIN_FREE_BYTES:
        raise MachineError(f"{free / 1e9:.1f} GB free", hint=f"at least {MIN_FREE_BYTES / 1e9:.1f} GB are wanted")
    return f"{free / 1e9:.1f} GB free"


def nearest(path: Path) -> Path:
    """Return the path itself, or the nearest folder above it that exists."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())
