"""``adtally services``: real Kafka and real Pinot on this machine, for trials and tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    from services.launcher.service import Service, Status
    from services.serving.tables import Source
    from spark_jobs.config import Settings

app = typer.Typer(
    help="Kafka and Pinot on this machine, for trials and tests. The default, files and DuckDB, needs neither.",
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

Heap = Annotated[str | None, typer.Option(help="Largest heap of its Java, as 512m or 2g.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete its data first.")]


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
    partitions: Annotated[int, typer.Option(min=1, max=1000, help="Partitions of the topics that are made.")] = 2,
    heap: Heap = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Start Kafka, wait until it answers, and make the topics that are missing. One that runs is left as it is.

    Its folder is HOME/services/kafka. The jars are downloaded once and checked on every start. A HOME/kafka.toml that names it
    is written where there is none.
    """
    settings = settings_of(context)
    kafka = _kafka(settings, heap)
    kafka.partitions = partitions
    found = kafka.up(_tell, fresh=fresh, wanted_ports={} if port is None else {"broker": port})
    if not settings.kafka_path.exists():
        settings.kafka_path.write_text(_KAFKA_FILE.format(servers=found.addresses["bootstrap_servers"]), "utf-8")
        _tell(f"wrote {settings.kafka_path}: adtally reads its topics and publishes to it from now on")
    _print(found, as_json)


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
    """Start ZooKeeper and Pinot, make its tables, and wait until every table answers a query.

    One that runs is left as it is; tables that are missing are made, and changed where their Kafka or settings changed. Without
    a Kafka no tables are made. For trials and tests. Its folder is HOME/services/pinot; login.password there is the password
    of user adtally, for whom controller and broker ask.
    """
    from services.serving.setup import ensure_tables, examine
    from services.serving.tables import table_specs
    from spark_jobs.attribution.rules import load_attribution_rules

    settings = settings_of(context)
    source, pinot = _source(settings, kafka), pinot_service(settings, heap)
    pinot.up(_tell, fresh=fresh)
    if source is None:
        _tell("no tables are made, for no Kafka is known: name one with --kafka, or `adtally services kafka up`")
    else:
        window_days = load_attribution_rules(settings).window_days
        specs = table_specs(examine(source), window_days=window_days, flush_rows=flush_rows)
        ensure_tables(pinot.client, specs, _tell)
    _tell(f"{pinot.name} is {pinot.warning}")
    _print(pinot.status(), as_json)


@kafka_app.command("down", epilog=examples("adtally services kafka down"))
def kafka_down(context: typer.Context, as_json: Json = False) -> None:
    """Stop it and wait until no process is left. Its data and its ports are kept."""
    _stop(_kafka(settings_of(context)), as_json)


@pinot_app.command("down", epilog=examples("adtally services pinot down"))
def pinot_down(context: typer.Context, as_json: Json = False) -> None:
    """Stop it and wait until no process is left. Its data and its ports are kept."""
    _stop(pinot_service(settings_of(context)), as_json)


@kafka_app.command(
    "status", epilog=examples("adtally services kafka status", "adtally services kafka status --json | jq .addresses")
)
def kafka_status(context: typer.Context, as_json: Json = False) -> None:
    """Whether it runs and answers, and where. Exit status 1 where it does not."""
    _ask(_kafka(settings_of(context)), as_json)


@pinot_app.command(
    "status", epilog=examples("adtally services pinot status", "adtally services pinot status --json | jq .addresses")
)
def pinot_status(context: typer.Context, as_json: Json = False) -> None:
    """Whether it runs and answers, and where. Exit status 1 where it does not."""
    _ask(pinot_service(settings_of(context)), as_json)


def _stop(service: Service, as_json: bool) -> None:
    ran = service.down(_tell)
    if as_json:
        _print(service.status(), as_json)
    else:
        say(f"{service.name} is stopped" if ran else f"{service.name} did not run")


def _ask(service: Service, as_json: bool) -> None:
    found = service.status()
    _print(found, as_json)
    if not found.running or found.problem:
        raise typer.Exit(1)


def _kafka(settings: Settings, heap: str | None = None) -> Kafka:
    from services.launcher.kafka import Kafka

    return Kafka(_root(settings), jar_cache=settings.jar_cache_path, java=_java, heap=_heap(heap))


def pinot_service(settings: Settings, heap: str | None = None) -> Pinot:
    """Return the Pinot of an installation, whether it runs or not."""
    from services.launcher.pinot import Pinot

    return Pinot(_root(settings), jar_cache=settings.jar_cache_path, java=_java, heap=_heap(heap))


def _source(settings: Settings, servers: str | None) -> Source | None:
    """Return the Kafka for Pinot to read: the named one, else that of kafka.toml, else the local one, else None."""
    from services.serving.tables import Source
    from spark_jobs.ingest.kafka.config import read_kafka

    published = read_kafka(settings).publish
    if published is not None and servers is None:
        cluster = published.cluster
        java = {name.removeprefix("kafka."): value for name, value in cluster.spark_options().items() if name.startswith("kafka.")}
        del java["bootstrap.servers"]
        return Source(
            cluster.bootstrap_servers,
            published.metrics_topic,
            published.credits_topic,
            client_options=cluster.client_options(),
            java_options=java,
        )
    if servers is None:
        servers = _kafka(settings).status().addresses.get("bootstrap_servers")
    return None if servers is None else Source(servers)


def _root(settings: Settings) -> Path:
    return settings.home_path / "services"


def _java() -> Path:
    from spark_jobs.java import require_java

    return require_java().executable


def _heap(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"[1-9]\d*[mg]", text):
        raise UsageError(f"--heap {text!r} is not a size", hint="as in 512m or 2g")
    return text


def _tell(line: str) -> None:
    say(line, stderr=True)


def _print(found: Status, as_json: bool) -> None:
    show(found, status_lines, as_json=as_json)


def status_lines(found: Status) -> Iterator[str]:
    """Say whether a service runs, and list its processes, its addresses and its topics or tables."""
    if not found.running:
        yield f"{found.service} {found.version} does not run{f': {found.problem}' if found.problem else ''}"
        return
    pids = ", ".join(f"{role} {pid}" for role, pid in found.processes.items())
    yield f"{found.service} {found.version} {f'is not usable: {found.problem}' if found.problem else 'runs'} (process {pids})"
    for use, address in found.addresses.items():
        yield f"  {use.replace('_', ' ')}: {address}"
    if found.holds:
        unit = "partitions" if found.service == "kafka" else "rows"
        yield f"  {unit}: {', '.join(f'{name} {size:,}' for name, size in found.holds.items())}"
    yield f"  folder: {found.folder}"
