"""The pages of the console, in the order of the menu. Each module has its pages with their queries and tables."""

from __future__ import annotations

from orchestration.console.pages import attribution, billing, campaign, campaigns, changes, invalid, operations, today, trust, why
from orchestration.console.view import Page

PAGES: tuple[Page, ...] = (
    today.PAGE,
    campaigns.PAGE,
    campaign.PAGE,
    trust.PAGE,
    invalid.PAGE,
    attribution.PAGE,
    billing.PAGE,
    billing.STATEMENT,
    operations.PAGE,
    why.PART,
    why.LINE,
    why.PAGE,
    changes.PAGE,
)
