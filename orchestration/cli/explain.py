"""The command ``adtally explain``: why is this number so?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from orchestration.cli import completion
from orchestration.cli.maintenance import Json
from orchestration.cli.options import examples, moment

if TYPE_CHECKING:
    from orchestration.explain import Node
    from spark_jobs.config import Settings

Sample = Annotated[int, typer.Option("--events", min=0, help="Events shown of each batch.")]


def add_commands(app: typer.Typer, settings: Callable[[], Settings]) -> None:
    """Put the commands into ``app``; ``settings`` gives those of the installation that the user named."""
    explain_app = typer.Typer(
        help="Why a number of the marts is what it is: build, Delta versions, batches, files, rules, corrections, events.",
        no_args_is_help=True,
        epilog=examples(
            "adtally explain fct_campaign_day --campaign c00001 --date 2025-06-02",
            "adtally explain fct_attribution_credits --order o-20250602-0000001",
            "adtally explain fct_billing_ledger --line 3f2a...",
        ),
    )
    app.add_typer(explain_app, name="explain")

    @explain_app.command(
        "fct_campaign_day", epilog=examples("adtally explain fct_campaign_day --campaign c00001 --date 2025-06-02")
    )
    def campaign_day(
        campaign: Annotated[str, typer.Option(help="The campaign_id.", autocompletion=completion.campaigns)],
        date: Annotated[str, typer.Option(help="The day (UTC), as 2025-06-02.")],
        events: Sample = 5,
        as_json: Json = False,
    ) -> None:
        """A campaign's day: its increments by batch, their files, rules, restatements and a sample of events.

        Exit status 1 where a level does not add up to the one above.
        """
        from orchestration.explain import explain_campaign_day

        show(explain_campaign_day(settings(), campaign, moment(date, "--date").date(), sample=events), as_json=as_json)

    @explain_app.command(
        "fct_attribution_credits",
        epilog=examples(
            "adtally explain fct_attribution_credits --order o-20250602-0000001",
            "adtally explain fct_attribution_credits --order o-20250602-0000001 --model linear --window 7",
        ),
    )
    def attribution_credits(
        order: Annotated[str, typer.Option(help="The order_id.")],
        model: Annotated[str | None, typer.Option(help="One model only, as last_click.")] = None,
        window: Annotated[int | None, typer.Option(min=1, help="One lookback window only, in days.")] = None,
        as_json: Json = False,
    ) -> None:
        """An order's credits: its revisions, its touches and where they came from, the rules.

        Exit status 1 where a level does not add up to the one above.
        """
        from orchestration.explain import explain_credit

        show(explain_credit(settings(), order, model=model, window=window), as_json=as_json)

    @explain_app.command("fct_billing_ledger", epilog=examples("adtally explain fct_billing_ledger --line 3f2a..."))
    def billing_ledger(
        line: Annotated[str, typer.Option(help="The line_id.")],
        events: Sample = 5,
        as_json: Json = False,
    ) -> None:
        """A line of the billing ledger: the other lines of its day, what the posting read, and the day itself.

        Exit status 1 where a level does not add up to the one above.
        """
        from orchestration.explain import explain_billing_line

        show(explain_billing_line(settings(), line, sample=events), as_json=as_json)


def show(node: Node, *, as_json: bool) -> None:
    """Print the explanation; exit status 1 where it does not add up."""
    from orchestration.cli.output import console, print_json
    from orchestration.explain import as_json as plain
    from orchestration.explain import as_tree

    if as_json:
        print_json(plain(node))
    else:
        console().print(as_tree(node))
    if any(node.all_problems()):
        raise typer.Exit(1)
