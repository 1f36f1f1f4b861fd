"""A small landing folder made from real impressions, its truth, and the way to put it in place."""

from __future__ import annotations

from samples.land import DAYS, START, events_by_hour, land, read_truth, weeks_until

__all__ = ["DAYS", "START", "events_by_hour", "land", "read_truth", "weeks_until"]
