"""The commands ``adtally publish``, which sends increments and credits to Kafka, and ``adtally budget``, an example consumer."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, OnlyStatus, Panel, examples
from orchestration.cli.output import console, print_json, say, show
from orchestration.cli.status import publications_table
from orchestration.cli.stopping import stop_on_signals
from orchestration.cli.tables import RecordTable, rest_line
from spark_jobs.errors import UsageError
from spark_jobs.texts import duration, money

if TYPE_CHECKING:
    from services.budget.report import BudgetStatus
    from spark_jobs.config import Settings
    from spark_jobs.publish.job import Published, PublishReport

app = typer.Typer()

_BUDGET_TOPIC = "ads-metrics"
_SHOWN = 20


@app.command(
    rich_help_panel=Panel.TAKE_IN,
    epilog=examples(
        "adtally publish                               all versions that are not published yet",
        "adtally publish --continuous                  each soon after its commit, until SIGTERM",
        "adtally publish --status --json               how far behind, by Kafka's own notes",
    ),
)
def publish(
    context: typer.Context,
    continuous: Annotated[bool, typer.Option("--continuous", help="Continue with new versions until stopped.")] = False,
    only_status: OnlyStatus = False,
    whole: Annotated[bool, typer.Option("--whole", help="Publish all present rows again, under the same ids.")] = False,
    adopt: Annotated[
        bool, typer.Option("--adopt-topic", help="Publish into a topic that has messages of another lakehouse.")
    ] = False,
    as_json: Json = False,
) -> None:
    r"""Publish increments and attribution credits to the Kafka topics that HOME/kafka.toml names, each exactly once.

    If kafka.toml has \[publish], `adtally ingest` publishes too: at its end, and with --continuous soon after each commit.
    """
    from spark_jobs.publish.job import PublishLoop, ask_publications, is_publishing, publish_new

    if (continuous and whole) or (only_status and (continuous or whole or adopt)):
        raise UsageError("--continuous, --whole and --status are for different runs", hint="use one of them")
    settings = settings_of(context)
    if only_status or not is_publishing(settings):  # without [publish] ask_publications raises and names the missing entries
        found = ask_publications(settings)
        show(found, [publications_table(found)], as_json=as_json)
        return
    if not continuous:
        report = publish_new(settings, whole=whole, adopt=adopt)
        show(report, published_lines(report), as_json=as_json)
        return

    def on_version(done: Published) -> None:
        if as_json:
            print_json(done, lines=True)
        else:
            version = f"version {done.version} of {done.table}, {done.records:,} messages"
            say(f"{done.topic}: {version}, {done.lag_seconds:.2f} s after its commit", stderr=True)

    shown = console(stderr=True)
    loop = PublishLoop(settings, adopt=adopt, progress=on_version, problem=lambda text: shown.print(text or "Kafka answers again"))
    with stop_on_signals() as stop:
        loop.run(stop)


@app.command(
    rich_help_panel=Panel.ASK,
    epilog=examples(
        "adtally budget --once                         all present messages, then end",
        "adtally budget --campaigns .adtally/landing/campaigns",
        "adtally budget --status --json | jq .campaigns",
        "adtally budget --bootstrap-servers 127.0.0.1:9092 --once",
    ),
)
def budget(
    context: typer.Context,
    cluster: Annotated[str | None, typer.Option(help="A cluster of HOME/kafka.toml. Default: that of \\[publish].")] = None,
    bootstrap_servers: Annotated[str | None, typer.Option(help="In place of --cluster: addresses of brokers.")] = None,
    topic: Annotated[str | None, typer.Option(help="Default: the metrics_topic of \\[publish], else ads-metrics.")] = None,
    store: Annotated[Path | None, typer.Option(help="The SQLite file. Default: HOME/budget/budget.sqlite.")] = None,
    once: Annotated[bool, typer.Option("--once", help="End when all present messages are consumed.")] = False,
    only_status: OnlyStatus = False,
    from_start: Annotated[bool, typer.Option("--from-start", help="Read the topic again; nothing counts twice.")] = False,
    accept_gap: Annotated[bool, typer.Option("--accept-gap", help="Skip deleted messages that were never consumed.")] = False,
    keep_days: Annotated[
        int, typer.Option(min=0, max=36_500, help="Keep the ids of so many days; older days are final. 0 keeps all.")
    ] = 35,
    campaigns: Annotated[Path | None, typer.Option(help="CSV of the campaigns with their budgets, or a folder of them.")] = None,
    day: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="The day to show. Default: the newest.")] = None,
    as_json: Json = False,
) -> None:
    """Run an example consumer: it sums spend per campaign and day from the topic of increments, exactly once, in SQLite.

    It shows how far it is behind the events. It sets unreadable messages aside with their place, and continues.
    """
    from services.budget.campaigns import read_budgets
    from services.budget.errors import BrokerError
    from services.budget.report import read_budget_status
    from services.budget.service import BudgetService

    settings = settings_of(context)
    path = store or settings.home_path / "budget" / "budget.sqlite"
    client, topic = _find_topic(settings, cluster, bootstrap_servers, topic, is_needed=not only_status)
    offsets_behind: dict[int, int] | None = None
    if client:
        service = BudgetService(path, client, topic, keep_days=keep_days or None)
        if not only_status:
            with stop_on_signals() as stop:
                service.run(stop, once=once, from_start=from_start, accept_gap=accept_gap)
        try:
            offsets_behind = service.lags()
        except BrokerError as error:
            say(str(error), stderr=True)
    budgets = read_budgets(campaigns) if campaigns else []
    now, shown_day = datetime.now(UTC), None if day is None else day.date().isoformat()
    found = read_budget_status(path, topic, now=now, budgets=budgets, day=shown_day, offsets_behind=offsets_behind)
    show(found, budget_tables(found), as_json=as_json)


def publish_at_end(settings: Settings) -> None:
    """Publish what an ingest wrote if kafka.toml has [publish]. Print a line for each topic on standard error."""
    from spark_jobs.publish.job import is_publishing, publish_new

    if is_publishing(settings):
        for line in published_lines(publish_new(settings)):
            say(line, stderr=True)


def _find_topic(
    settings: Settings, cluster: str | None, servers: str | None, topic: str | None, *, is_needed: bool
) -> tuple[dict[str, str], str]:
    """Return the client options of the cluster (empty if none is configured and it is not needed), and the topic."""
    from spark_jobs.ingest.kafka.config import read_kafka

    if servers is not None:
        if cluster is not None:
            raise UsageError("--cluster and --bootstrap-servers name two places", hint="use one of them")
        return {"bootstrap.servers": servers}, topic or _BUDGET_TOPIC
    kafka = read_kafka(settings)
    publish = kafka.publish
    chosen = kafka.cluster(cluster) if cluster is not None else publish.cluster if publish else None
    if chosen is None and is_needed:
        hint = "use --bootstrap-servers, or --cluster with a cluster of HOME/kafka.toml"
        raise UsageError("no cluster is known for the topic", hint=hint)
    return chosen.client_options() if chosen else {}, topic or (publish.metrics_topic if publish else _BUDGET_TOPIC)


def published_lines(report: PublishReport) -> Iterator[str]:
    """Return a line for each topic of a report."""
    for topic in report.topics:
        messages = f"{topic.records:,} messages of {topic.versions:,} versions, up to version {topic.version} of"
        yield f"{topic.topic}: {messages if topic.versions else 'nothing new in'} {topic.table}"


def budget_tables(found: BudgetStatus) -> Iterator[RenderableType]:
    """Make the table of campaigns (those over budget first, then by currency and spend), and say how far behind it is."""
    day = found.campaigns[0].event_date if found.campaigns else "-"
    spend = RecordTable(f"Spend of {day}", "campaign", "store", "impressions", "clicks", "spend", "budget", "", left=2)
    rows = sorted(found.campaigns, key=lambda row: (not row.is_over, row.currency, -row.spend_nanos))
    for row in rows[:_SHOWN]:
        amount = f"{money(row.spend_micros * 1000, row.currency)} {row.currency}"
        budget = None if row.budget_micros is None else money(row.budget_micros * 1000, row.currency)
        over = Text("over" if row.is_over else "", style="red")
        spend.add_row(row.campaign_id, row.store_id, row.impressions, row.clicks, amount, budget, over)
    yield spend
    yield from rest_line(len(rows), _SHOWN, "campaign")
    if found.event_minute is None or found.committed_at is None:
        yield "nothing consumed yet"
    else:
        yield (
            f"events up to {found.event_minute:%Y-%m-%d %H:%M} UTC, {duration(found.events_seconds_behind)} behind; the newest "
            f"increment was committed at {found.committed_at:%H:%M:%S} and consumed {duration(found.consumed_seconds_after)} later"
        )
    if found.offsets_behind is not None:
        behind = ", ".join(f"{partition}: {offsets:,}" for partition, offsets in sorted(found.offsets_behind.items()))
        yield f"offsets behind, by partition of {found.topic}: {behind}"
    for reason, count in sorted(found.aside.items()):
        yield Text(f"{count:,} messages put aside: {reason}", style="red")
