"""A small landing folder made from real impressions, its truth, and the way to put it in place."""

from __future__ import annotations

from samples.land import land

__all__ = ["land"]
