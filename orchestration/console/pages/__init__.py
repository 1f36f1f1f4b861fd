"""The pages of the console, in the order of the menu. Each module has one page with its queries and tables."""

from __future__ import annotations

from orchestration.console.pages import campaign, campaigns, changes, today, why
from orchestration.console.view import Page

PAGES: tuple[Page, ...] = (
    today.PAGE,
    campaigns.PAGE,
    campaign.PAGE,
    why.PART,
    why.LINE,
    why.PAGE,
    changes.PAGE,
)
