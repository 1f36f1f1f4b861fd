"""The command ``adtally simulate``: seeded traffic with a known truth, as landing files or as records of Kafka topics."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, Panel, examples, moment
from orchestration.cli.output import console, show
from spark_jobs.errors import UsageError

if TYPE_CHECKING:
    from services.simulator.kafka import Cluster

app = typer.Typer()

_LONGEST_DAYS = 36_500
_HIGHEST_RATE = 1_000_000_000
_REGION = re.compile(r"[a-z0-9-]{1,32}")
_kafka_option = partial(typer.Option, rich_help_panel="Into Kafka")


class Target(StrEnum):
    """Where to send simulated traffic."""

    files = "files"
    kafka = "kafka"


@app.command(
    rich_help_panel=Panel.TRY,
    epilog=examples(
        "adtally simulate --out traffic --events 1000000 --seed 7",
        "adtally simulate --out .adtally/landing --events 50000 --seed 1 --days 1",
        "adtally simulate --out traffic --events 60000 --seed 1 --rate 2000 --json",
        "adtally simulate --out s3://bucket/landing --events 50000 --seed 1",
        "adtally simulate --to kafka --events 100000 --seed 1               to the clusters of kafka.toml",
        "adtally simulate --to kafka --live --rate 1000 --events 60000      a minute of traffic, as it happens",
        "adtally simulate --to kafka --bootstrap-servers eu-west=127.0.0.1:9092 --events 100000 --out traffic --transactional",
    ),
)
def simulate(
    context: typer.Context,
    events: Annotated[int, typer.Option(min=1, help="Event lines, of every kind.")],
    out: Annotated[
        str | None,
        typer.Option(help="Folder or URI to write, new or empty, or the landing folder: the default for Kafka."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed and options give the same bytes.")] = 0,
    start: Annotated[str | None, typer.Option(help="When the traffic begins: 2025-06-02 or an RFC 3339 time.")] = None,
    days: Annotated[float | None, typer.Option(help="How many days it lasts. Default: 3.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="In place of --days: event lines a second. For Kafka also the rate of sending.")
    ] = None,
    listed_users: Annotated[int, typer.Option(min=0, help="Put so many users on the operator's list in OUT/rules.")] = 0,
    to: Annotated[Target, _kafka_option(help="Landing files, or the topics of one or two Kafka clusters.")] = Target.files,
    bootstrap_servers: Annotated[
        list[str] | None,
        _kafka_option(metavar="REGION=HOST:PORT", help="A cluster, in place of those of kafka.toml; once or twice."),
    ] = None,
    transactional: Annotated[bool, _kafka_option("--transactional", help="Transactions of 10,000 records each.")] = False,
    abort_some: Annotated[float, _kafka_option(help="Share of the transactions to abort once and then send again.")] = 0.0,
    mirror: Annotated[float, _kafka_option(help="Share of the ids whose records to send to the other cluster too.")] = 0.0,
    mirror_again: Annotated[float, _kafka_option(help="Share of the mirrored records to mirror twice.")] = 0.0,
    clock_ahead: Annotated[
        list[str] | None, _kafka_option(metavar="REGION=SECONDS", help="How far the clock of a cluster's collectors is ahead.")
    ] = None,
    live: Annotated[bool, _kafka_option("--live", help="Now, at --rate: received_at is the time of sending.")] = False,
    as_json: Json = False,
) -> None:
    """Write seeded traffic as landing files, and truth.json: what an exact system must report for it.

    It has duplicates, conflicts, late events, clocks in the future, broken lines, two regions, invalid traffic (bots, repeats,
    bursts of clicks) and orders with none, one and many touches. The truth assumes the default rules, or those in OUT/rules if
    it writes them: copy these into the folder rules of ADTALLY_HOME.

    With --to kafka the lines become records of the topics, with their ids as keys; OUT gets campaigns and truth.json. After an
    interruption send everything again: the same ids count once. Exit status 1 if a cluster did not accept a record.
    """
    options: dict[str, Any] = {"days": days, "rate": rate, "listed_users": listed_users}
    if start is not None:
        options["start"] = begin = moment(start, "--start")
        if not 1970 <= begin.year < 2200:
            raise UsageError(f"--start {start!r} is out of range", hint="files have times from 1970 on; up to 2199")
    if rate is not None and rate > 0 and days is None and events / rate > _LONGEST_DAYS * 86_400:
        raise UsageError(f"--rate {rate:g} would take more than {_LONGEST_DAYS:,} days", hint="raise it")
    for option, value, highest in (("--rate", rate, _HIGHEST_RATE), ("--days", days, _LONGEST_DAYS)):
        if value is not None and value > highest:
            raise UsageError(f"{option} {value:g} is out of range", hint=f"up to {highest:,}")
    sending: dict[str, Any] = {
        "transactional": transactional,
        "abort_some": abort_some,
        "mirror": mirror,
        "mirror_again": mirror_again,
        "clocks_ahead": _numbers(clock_ahead or [], "--clock-ahead"),
        "live": live,
    }
    from spark_jobs.lake.landing_view import landing_folder

    clusters: list[Cluster] = []
    if to is Target.kafka:
        out = out or settings_of(context).landing_uri
        clusters = _clusters(context, bootstrap_servers or [])
    elif any(sending.values()) or bootstrap_servers:
        raise UsageError("these options are for Kafka", hint="add --to kafka")
    elif out is None:
        raise UsageError("Missing option '--out'", hint="name a folder that is new or empty")
    started = time.monotonic()
    try:
        with _progress_bar(events) as progress, landing_folder(out) as folder:
            if clusters:
                from services.simulator.kafka import Sending, simulate_to_kafka

                if live:  # the rate of sending decides how long the traffic lasts
                    options = {name: value for name, value in options.items() if name != "rate" and value is not None}
                chosen = Sending(rate=rate, **sending)
                totals = simulate_to_kafka(folder, events, seed, clusters, chosen, progress=progress, **options).totals
            else:
                from services.simulator.simulate import simulate as write_files

                totals = write_files(folder, events, seed, progress=progress, **options).totals
    except OSError as error:
        raise UsageError(f"{error.filename or out} cannot be written: {error.strerror}", hint="name another with --out") from error
    counts = ", ".join(f"{totals[name]:,} {name}" for name in ("accepted", "duplicate", "conflict", "rejected", "late"))
    lines = []
    place = str(out)
    if clusters:
        sent = sum(topics["events"] + topics["orders"] for topics in totals["messages"].values())
        place = f"Kafka of {' and '.join(cluster.name for cluster in clusters)}"
        lines.append(f"{sent:,} records sent in {time.monotonic() - started:.1f} s")
    lines += [f"{totals['offered']:,} event lines in {place}: {counts}", f"what an exact system must report: {out}/truth.json"]
    if listed_users:
        lines.append(f"the rules that the truth assumes, for <ADTALLY_HOME>/rules: {out}/rules")
    show({"out": out, "truth": f"{out}/truth.json", "seed": seed, "totals": totals}, lines, as_json=as_json)


def _clusters(context: typer.Context, named: list[str]) -> list[Cluster]:
    """Return the clusters of --bootstrap-servers, else the consumed ones of kafka.toml. Raises UsageError if there are none."""
    from services.simulator.kafka import Cluster
    from spark_jobs.ingest.kafka.config import read_kafka

    configured = [] if named else read_kafka(settings_of(context)).consumed
    found = [Cluster(cluster.name, cluster.client_options(), cluster.events_topic, cluster.orders_topic) for cluster in configured]
    for text in named:
        region, _, servers = text.partition("=")
        if not servers or _REGION.fullmatch(region) is None:
            raise UsageError(f"--bootstrap-servers {text!r} is not REGION=HOST:PORT", hint="as in eu-west=127.0.0.1:9092")
        found.append(Cluster(region, {"bootstrap.servers": servers}))
    if not found:
        raise UsageError("no Kafka is configured", hint="name it with --bootstrap-servers REGION=HOST:PORT, or in kafka.toml")
    return found


def _numbers(named: list[str], option: str) -> dict[str, float]:
    found = {}
    for text in named:
        region, _, value = text.partition("=")
        try:
            found[region] = float(value)
        except ValueError:
            raise UsageError(f"{option} {text!r} is not REGION=SECONDS", hint="as in us-east=60") from None
    return found


@contextmanager
def _progress_bar(events: int) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error. Yields the function that moves it, which takes the lines done and the lines in all."""
    from rich.progress import Progress

    shown = console(stderr=True)
    # without a terminal the bar would print an empty line
    with Progress(console=shown, transient=True, disable=not shown.is_terminal) as bar:
        task = bar.add_task("simulating", total=events)
        yield lambda done, total: bar.update(task, completed=done, total=total)
