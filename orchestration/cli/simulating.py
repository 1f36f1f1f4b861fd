"""`adtally simulate`: seeded traffic with a known truth, as landing files or as records of Kafka topics."""

from __future__ import annotations

import re
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, Panel, examples, moment
from orchestration.cli.output import console, print_json, say
from spark_jobs.errors import KafkaError, UsageError

if TYPE_CHECKING:
    from services.simulator.kafka import Cluster

app = typer.Typer()

_LONGEST_DAYS = 36_500
_HIGHEST_RATE = 1_000_000_000
_KAFKA = "Into Kafka"
_REGION = re.compile(r"[a-z0-9-]{1,32}")


class Target(StrEnum):
    """Where simulated traffic goes."""

    files = "files"
    kafka = "kafka"


@app.command(
    rich_help_panel=Panel.TRY,
    epilog=examples(
        "adtally simulate --out traffic --events 1000000 --seed 7",
        "adtally simulate --out .adtally/landing --events 50000 --seed 1 --days 1",
        "adtally simulate --out traffic --events 60000 --seed 1 --rate 2000 --json",
        "adtally simulate --to kafka --events 100000 --seed 1               to the clusters of kafka.toml",
        "adtally simulate --to kafka --live --rate 1000 --events 60000      a minute of traffic, as it happens",
        "adtally simulate --to kafka --bootstrap-servers eu-west=127.0.0.1:9092 --events 100000 --out traffic --transactional",
    ),
)
def simulate(
    context: typer.Context,
    events: Annotated[int, typer.Option(min=1, help="Event lines, of every kind.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write, new or empty. The landing folder will do, and is it for Kafka.", file_okay=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed and options give the same bytes.")] = 0,
    start: Annotated[str | None, typer.Option(help="When the traffic begins: 2025-06-02 or an RFC 3339 time.")] = None,
    days: Annotated[float | None, typer.Option(help="How many days it lasts. Default: 3.")] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="In place of --days: event lines a second. Into Kafka they also go at that rate by the clock."),
    ] = None,
    listed_users: Annotated[int, typer.Option(min=0, help="So many users are on the operator's list: OUT/rules has it.")] = 0,
    to: Annotated[
        Target, typer.Option(help="Landing files, or the topics of one Kafka cluster or two.", rich_help_panel=_KAFKA)
    ] = Target.files,
    bootstrap_servers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGION=HOST:PORT",
            help="A cluster, in place of those of kafka.toml; once or twice.",
            rich_help_panel=_KAFKA,
        ),
    ] = None,
    transactional: Annotated[
        bool, typer.Option("--transactional", help="Transactions of 10,000 records each.", rich_help_panel=_KAFKA)
    ] = False,
    abort_some: Annotated[
        float,
        typer.Option(help="Share of the transactions that are aborted once, then sent again.", rich_help_panel=_KAFKA),
    ] = 0.0,
    mirror: Annotated[
        float, typer.Option(help="Share of the ids whose records go through the other cluster too.", rich_help_panel=_KAFKA)
    ] = 0.0,
    mirror_again: Annotated[
        float, typer.Option(help="Share of the mirrored records that are mirrored twice.", rich_help_panel=_KAFKA)
    ] = 0.0,
    clock_ahead: Annotated[
        list[str] | None,
        typer.Option(metavar="REGION=SECONDS", help="The clock of a cluster's collectors is so far ahead.", rich_help_panel=_KAFKA),
    ] = None,
    live: Annotated[
        bool,
        typer.Option("--live", help="Now, at --rate: received_at is the time of sending.", rich_help_panel=_KAFKA),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write seeded traffic as landing files, and truth.json: what an exact system must report for it.

    With duplicates, conflicts, late events, clocks in the future, broken lines, two regions, invalid traffic (bots,
    repeats, bursts of clicks) and orders with none, one and many touches. The truth supposes the default rules, or
    those of OUT/rules where it writes them: put these into the folder rules of ADTALLY_HOME.

    With --to kafka the lines become records of the topics, under their ids as keys; campaigns and truth.json go into OUT.
    Whoever was stopped can send all again: the same ids count once. Exit status 1 where a cluster did not take a record.
    """
    options: dict[str, Any] = {"days": days, "rate": rate, "listed_users": listed_users}
    if start is not None:
        options["start"] = begin = moment(start, "--start")
        if not 1970 <= begin.year < 2200:
            raise UsageError(f"--start {start!r} is out of range", hint="files have times from 1970 on; up to 2199")
    if rate is not None and rate > 0 and days is None and events / rate > _LONGEST_DAYS * 86_400:
        raise UsageError(f"--rate {rate:g} would take more than {_LONGEST_DAYS:,} days", hint="raise it")
    if rate is not None and rate > _HIGHEST_RATE:
        raise UsageError(f"--rate {rate:g} is out of range", hint=f"up to {_HIGHEST_RATE:,}")
    if days is not None and days > _LONGEST_DAYS:
        raise UsageError(f"--days {days:g} is out of range", hint=f"up to {_LONGEST_DAYS:,}")
    sending = {
        "transactional": transactional,
        "abort_some": abort_some,
        "mirror": mirror,
        "mirror_again": mirror_again,
        "clocks_ahead": _numbers(clock_ahead or [], "--clock-ahead"),
        "live": live,
    }
    if to is Target.kafka:
        folder = out or settings_of(context).landing_path
        _run(folder, events, seed, options, as_json, _clusters(context, bootstrap_servers or []), sending)
        return
    if any(sending.values()) or bootstrap_servers:
        raise UsageError("these options are for Kafka", hint="add --to kafka")
    if out is None:
        raise UsageError("Missing option '--out'", hint="name a folder that is new or empty")
    _run(out, events, seed, options, as_json)


def _clusters(context: typer.Context, named: list[str]) -> list[Cluster]:
    """Return the clusters of --bootstrap-servers, else the consumed ones of kafka.toml. Raises UsageError if there are none."""
    from services.simulator.kafka import Cluster
    from spark_jobs.ingest.kafka.config import read_kafka

    found = [
        Cluster(one.name, one.client_options(), one.events_topic, one.orders_topic)
        for one in (() if named else read_kafka(settings_of(context)).consumed)
    ]
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


def _run(
    out: Path,
    events: int,
    seed: int,
    options: dict[str, Any],
    as_json: bool,
    clusters: list[Cluster] | None = None,
    sending: dict[str, Any] | None = None,
) -> None:
    from rich.progress import Progress

    from services.simulator.errors import DeliveryError, SimulationError
    from services.simulator.simulate import simulate

    shown = console(stderr=True)
    started = time.monotonic()
    try:
        # without a terminal the bar would print an empty line
        with Progress(console=shown, transient=True, disable=not shown.is_terminal) as bar:
            task = bar.add_task("simulating", total=events)

            def progress(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            if clusters is None:
                truth = simulate(out, events, seed, progress=progress, **options)
            else:
                from services.simulator.kafka import Sending, simulate_to_kafka

                rate = options["rate"]
                if (sending or {}).get("live"):  # the rate paces the sending and thereby says how long it lasts
                    options = {name: value for name, value in options.items() if name != "rate" and value is not None}
                truth = simulate_to_kafka(
                    out, events, seed, clusters, Sending(rate=rate, **(sending or {})), progress=progress, **options
                )
    except SimulationError as error:
        raise UsageError(str(error)) from None
    except DeliveryError as error:
        raise KafkaError(error.message, hint=error.hint) from None
    except OSError as error:
        raise UsageError(f"{error.filename or out} cannot be written: {error.strerror}", hint="name another with --out") from error
    seconds = time.monotonic() - started
    totals = truth.totals
    if as_json:
        print_json({"out": str(out), "truth": str(out / "truth.json"), "seed": seed, "totals": totals})
        return
    counts = ", ".join(f"{totals[name]:,} {name}" for name in ("accepted", "duplicate", "conflict", "rejected", "late"))
    where = str(out)
    if clusters is not None:
        sent = sum(held["events"] + held["orders"] for held in totals["messages"].values())
        where = f"Kafka of {' and '.join(cluster.name for cluster in clusters)}"
        say(f"{sent:,} records sent in {seconds:.1f} s")
    say(f"{totals['offered']:,} event lines in {where}: {counts}")
    say(f"what an exact system must report: {out / 'truth.json'}")
    if options.get("listed_users"):
        say(f"the rules that it supposes, for <ADTALLY_HOME>/rules: {out / 'rules'}")
