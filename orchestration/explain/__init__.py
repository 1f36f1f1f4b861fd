"""Explains a number of a mart: its build, batches, files, rules, corrections and events."""

from __future__ import annotations

from orchestration.explain.billing import explain_billing_line
from orchestration.explain.campaign_day import explain_batch_events, explain_campaign_day
from orchestration.explain.credits import explain_credit
from orchestration.explain.node import Node, as_json, as_tree

__all__ = ["Node", "as_json", "as_tree", "explain_batch_events", "explain_billing_line", "explain_campaign_day", "explain_credit"]
