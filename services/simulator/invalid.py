"""Finds the accepted events that are invalid traffic by the default rules.

The rules, in their order; the first that hits names the event's rule:

- `crawler_user_agent`: the package crawler-user-agents knows the user agent.
- `listed_user`: the operator's list has the user.
- `repeat_click`, `repeat_impression`: an accepted event of the same user, ad and type (valid or not) lies before it, by
  time and then by event id, by less than the window: an hour for clicks, a minute for impressions.
- `click_rate`: the user has more than 60 accepted clicks in the hour of the event (UTC); all of them are invalid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import crawleruseragents
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

HOUR_US = 3_600_000_000
CLICK_WINDOW_US = HOUR_US
IMPRESSION_WINDOW_US = 60_000_000
CLICK_LIMIT = 60
RULES = ("crawler_user_agent", "listed_user", "repeat_click", "repeat_impression", "click_rate")
BILLABLE = -1


@cache
def is_crawler(user_agent: str) -> bool:
    """Return whether the package's list knows the user agent; False for none."""
    return bool(user_agent) and bool(crawleruseragents.is_crawler(user_agent))


def repeats(
    user: npt.NDArray[np.integer[Any]],
    ad: npt.NDArray[np.integer[Any]],
    is_click: Bools,
    event_us: Ints,
    id_high: npt.NDArray[np.uint64],
    id_low: npt.NDArray[np.uint64],
) -> Bools:
    """Return which events follow one of the same user, ad and type within the window; the previous one decides."""
    ads = int(ad.max(initial=0)) + 1
    key = (user.astype(np.int64) * ads + ad) * 2 + is_click
    order = np.lexsort((id_low, id_high, event_us, key))
    window = np.where(is_click, CLICK_WINDOW_US, IMPRESSION_WINDOW_US)[order][1:]
    found = np.zeros(len(order), np.bool_)
    found[order[1:]] = (key[order][1:] == key[order][:-1]) & (np.diff(event_us[order]) < window)
    return found


def over_click_rate(user: npt.NDArray[np.integer[Any]], is_click: Bools, event_us: Ints) -> Bools:
    """Return which clicks belong to a user and hour with more than the limit."""
    found = np.zeros(len(user), np.bool_)
    clicks = np.flatnonzero(is_click)
    hour = event_us[clicks] // HOUR_US
    span = int(hour.max(initial=0)) + 1
    _, group, count = np.unique(user[clicks].astype(np.int64) * span + hour, return_inverse=True, return_counts=True)
    found[clicks] = (count > CLICK_LIMIT)[group]
    return found


def first_rule(hits: Sequence[Bools]) -> npt.NDArray[np.int8]:
    """Return for each event the number of the first of RULES that hits, or BILLABLE. ``hits`` has one mask a rule."""
    return np.select(list(hits), [np.int8(number) for number in range(len(hits))], default=np.int8(BILLABLE)).astype(np.int8)
