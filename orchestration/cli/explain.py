"""The commands ``adtally explain``: where a number of the marts comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.cli import completion
from orchestration.cli.context import settings_of
from orchestration.cli.options import Json, examples, moment
from orchestration.cli.output import show

if TYPE_CHECKING:
    from orchestration.explain import Node

Sample = Annotated[int, typer.Option("--events", min=0, help="Events shown of each batch.")]

app = typer.Typer(
    help="Explain a number of the marts: build, Delta versions, batches, files, rules, corrections, events.",
    no_args_is_help=True,
    epilog=examples(
        "adtally explain fct_campaign_day --campaign c00001 --date 2025-06-02",
        "adtally explain fct_attribution_credits --order o-20250602-0000001",
        "adtally explain fct_billing_ledger --line 3f2a...",
    ),
)


@app.command("fct_campaign_day", epilog=examples("adtally explain fct_campaign_day --campaign c00001 --date 2025-06-02"))
def campaign_day(
    context: typer.Context,
    campaign: Annotated[str, typer.Option(help="The campaign_id.", autocompletion=completion.campaigns)],
    date: Annotated[str, typer.Option(help="The day (UTC), as 2025-06-02.")],
    events: Sample = 5,
    as_json: Json = False,
) -> None:
    """Explain a campaign's day: its increments by batch, their files, rules, restatements and a sample of events.

    Exit status 1 if a level does not add up to the one above.
    """
    from orchestration.explain import explain_campaign_day

    show_node(explain_campaign_day(settings_of(context), campaign, moment(date, "--date").date(), sample=events), as_json=as_json)


@app.command(
    "fct_attribution_credits",
    epilog=examples(
        "adtally explain fct_attribution_credits --order o-20250602-0000001",
        "adtally explain fct_attribution_credits --order o-20250602-0000001 --model linear --window 7",
    ),
)
def attribution_credits(
    context: typer.Context,
    order: Annotated[str, typer.Option(help="The order_id.")],
    model: Annotated[str | None, typer.Option(help="Only this model, as last_click.")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Only this lookback window, in days.")] = None,
    as_json: Json = False,
) -> None:
    """Explain an order's credits: its revisions, its touches and their sources, the rules.

    Exit status 1 if a level does not add up to the one above.
    """
    from orchestration.explain import explain_credit

    show_node(explain_credit(settings_of(context), order, model=model, window=window), as_json=as_json)


@app.command("fct_billing_ledger", epilog=examples("adtally explain fct_billing_ledger --line 3f2a..."))
def billing_ledger(
    context: typer.Context, line: Annotated[str, typer.Option(help="The line_id.")], events: Sample = 5, as_json: Json = False
) -> None:
    """Explain a line of the billing ledger: the other lines of its day, what the posting read, and the day itself.

    Exit status 1 if a level does not add up to the one above.
    """
    from orchestration.explain import explain_billing_line

    show_node(explain_billing_line(settings_of(context), line, sample=events), as_json=as_json)


def show_node(node: Node, *, as_json: bool) -> None:
    """Print the explanation. Raises typer.Exit with status 1 if a level does not add up."""
    from orchestration.explain import as_json as json_values
    from orchestration.explain import as_tree

    show(json_values(node), [as_tree(node)], as_json=as_json)
    if any(node.all_problems()):
        raise typer.Exit(1)
