"""Draws the event traffic: the events that happen (`Events`), then the lines offered of them (`Lines`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.simulator import encode
from services.simulator.broken import EVENT_BREAKAGES
from services.simulator.errors import SimulationError
from services.simulator.truth import HOUR_US, NO_TIME, EventLines, Ints, Limits
from services.simulator.world import REGIONS, World

Integers = npt.NDArray[np.integer[Any]]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

_SECOND_US = 1_000_000
_MINUTE_US = 60 * _SECOND_US
_DAY_US = 24 * HOUR_US
_MICROSECONDS_OF_LIMIT = np.timedelta64(1, "us")

# Traffic by hour of the day in UTC: evenings are busy, and later in the west.
HOURLY_WEIGHTS = (
    (3, 2, 1, 1, 1, 2, 4, 6, 7, 8, 9, 12, 13, 11, 9, 9, 11, 15, 18, 18, 15, 11, 8, 5),
    (15, 11, 8, 5, 3, 2, 1, 1, 1, 2, 4, 6, 7, 8, 9, 12, 13, 11, 9, 9, 11, 15, 18, 18),
)
_SHARE_OF_REGION = (0.55, 0.45)

PLACEMENTS = ("", "feed", "search", "storefront", "checkout", "café-banner")
PEOPLE_AGENTS = (
    "",
    "Mozilla/5.0 (Linux; Android 14; Pixel 8) AppleWebKit/537.36 Chrome/125.0.0.0 Mobile Safari/537.36",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 Version/17.5 Mobile/15E148",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:126.0) Gecko/20100101 Firefox/126.0",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 14_5) AppleWebKit/605.1.15 Version/17.5 Safari/605.1.15",
    "FoodApp/8.41 (iOS 17.5; iPhone15,2)",
)
CRAWLER_AGENTS = (
    "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
    "Mozilla/5.0 (compatible; bingbot/2.0; +http://www.bing.com/bingbot.htm)",
    "Mozilla/5.0 (compatible; AhrefsBot/7.0; +http://ahrefs.com/robot/)",
    "python-requests/2.32.3",
)
AGENTS = (*PEOPLE_AGENTS, *CRAWLER_AGENTS)
EXTRAS = ("", ',"sdk":"3.14.2"', ',"debug":{"attempt":2,"tags":["a","b"]}', ',"note":"Grüße"')

CLICK_WINDOW_US = HOUR_US
IMPRESSION_WINDOW_US = _MINUTE_US
_DIGITS = np.array([3] * 10 + [6] * 6 + [0, 1, 2, 4, 5, 0], np.uint8)  # of the second's fraction
_BURST_SIZES = (61, 60, 75, 89)

INTENTS = ("first_time", "resend_same_file", "resend_later_file", "resend_days_later", "resend_other_region", "conflict", "broken")
FIRST_TIME, SAME_FILE, LATER_FILE, DAYS_LATER, OTHER_REGION, CONFLICT, BROKEN = range(7)


@dataclass(frozen=True)
class SimulationShares:
    """The share of each kind in all offered event lines.

    Resends arrive after the first sending: ``resend_same_file`` by seconds, ``resend_later_file`` by minutes to hours,
    ``resend_days_later`` by one to three days (by hours if the simulated time is too short); ``resend_other_region`` is a mirror in
    the other region's folder. ``late`` events arrive after the grace of their hour, up to two days; ``future`` clocks run ahead by
    more than the allowed skew (rejected), ``skewed`` by less (accepted). ``broken`` lines break the contract. ``bots`` have the
    user agent of a crawler. ``repeats`` follow an event of the same user and ad, most within the window of the repeat rules, some
    exactly at its end. ``click_bursts`` are dozens of clicks of a user in an hour; ``journeys`` are clicks of a user on one store's
    ads over days.
    """

    resend_same_file: float = 0.012
    resend_later_file: float = 0.012
    resend_days_later: float = 0.006
    resend_other_region: float = 0.010
    conflict: float = 0.005
    late: float = 0.020
    future: float = 0.003
    skewed: float = 0.002
    broken: float = 0.005
    bots: float = 0.010
    repeats: float = 0.004
    click_bursts: float = 0.003
    journeys: float = 0.002

    def __post_init__(self) -> None:
        """Raise SimulationError if a share is out of range or less than half of the lines would be ordinary."""
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise SimulationError(f"the share {name} is {value}", hint="a share lies between 0 and 1")
        if sum(vars(self).values()) > 0.5:
            raise SimulationError("the shares sum to more than 0.5", hint="at least half of the lines must be ordinary")


@dataclass(frozen=True)
class Events:
    """The events, one row each, impressions first. Times are microseconds since the epoch.

    ``digits`` is the number of digits of the second's fraction, ``offset`` tells +02:00 from Z, ``impression`` is the row of a
    click's impression (-1: none). ``journeys`` are the rows of the clicks of each journey. ``raw_ids`` is (n + broken lines, 16):
    ids of lines that never were an event follow.
    """

    raw_ids: npt.NDArray[np.uint8]
    event_us: Ints
    received_us: Ints
    digits: npt.NDArray[np.uint8]
    offset: Bools
    region: npt.NDArray[np.uint8]
    ad: npt.NDArray[np.int32]
    user: npt.NDArray[np.int32]
    impression: npt.NDArray[np.int32]
    placement: npt.NDArray[np.uint8]
    agent: npt.NDArray[np.uint8]
    extra: npt.NDArray[np.uint8]
    price_micros: Ints
    has_price: Bools
    has_region: Bools
    journeys: Sequence[npt.NDArray[np.intp]]

    @property
    def is_click(self) -> Bools:
        """Return which events follow an impression."""
        return self.impression >= 0


@dataclass(frozen=True)
class Lines:
    """The offered lines, one row each: their event, their id, and what differs from the event.

    ``variant`` is 0 for the event itself and 1 for its conflicting version; ``breakage`` is -1 or an index into EVENT_BREAKAGES;
    ``intent`` an index into INTENTS.
    """

    event: npt.NDArray[np.int32]
    identity: npt.NDArray[np.int32]
    event_us: Ints
    received_us: Ints
    region: npt.NDArray[np.uint8]
    user: npt.NDArray[np.int32]
    price_micros: Ints
    has_price: Bools
    variant: npt.NDArray[np.uint8]
    breakage: npt.NDArray[np.int8]
    intent: npt.NDArray[np.uint8]

    def truth_columns(self, order: Integers, events: Events, world: World, listed_users: Integers) -> EventLines:
        """Return the columns of the truth for lines in this order; ``listed_users`` are on the operator's list."""
        event = self.event[order]
        breakage = self.breakage[order]
        keeps_time = np.array([kind.keeps_time for kind in EVENT_BREAKAGES] + [True])
        campaign = world.campaign_of_ad[events.ad[event]]
        ids = encode.version_4(events.raw_ids[self.identity[order]]).view(">u8").astype(np.uint64)
        return EventLines(
            region=self.region[order],
            event_us=np.where(keeps_time[breakage], self.event_us[order], NO_TIME),
            received_us=self.received_us[order],
            well_formed=breakage < 0,
            identity=self.identity[order],
            payload=self.variant[order],
            campaign=campaign,
            currency=world.currency_of_campaign[campaign],
            is_click=events.is_click[event],
            user=self.user[order],
            ad=events.ad[event],
            agent=events.agent[event],
            is_listed=np.isin(self.user[order], listed_users),
            id_high=ids[:, 0],
            id_low=ids[:, 1],
            price_micros=self.price_micros[order],
        )


def _ceil_ms(us: Ints) -> Ints:
    return -(-us // 1000) * 1000


def _lag_us(u: Floats) -> Ints:
    """Return normal times from event to collector: 0.2 s to 12.2 s, median near 0.8 s."""
    return ((0.2 + 0.6 * u / (1.05 - u)) * _SECOND_US).astype(np.int64)


def _moments(
    rng: np.random.Generator, region: npt.NDArray[np.uint8], hourly_weights: Sequence[Sequence[float]], start_us: int, end_us: int
) -> Ints:
    """Draw times between start and end by each region's daily curve."""
    result = np.empty(len(region), np.int64)
    edges = np.arange(start_us // HOUR_US, -(-end_us // HOUR_US) + 1) * HOUR_US
    for code in range(len(REGIONS)):
        inner = np.clip(edges, start_us, end_us)
        weights = np.array(hourly_weights[code])[(edges[:-1] // HOUR_US) % 24] * np.diff(inner)
        cumulative = np.concatenate([[0.0], np.cumsum(weights)])
        where = np.flatnonzero(region == code)
        u = rng.random(len(where)) * cumulative[-1]
        result[where] = start_us + np.interp(u, cumulative, inner - start_us).astype(np.int64)
    return np.minimum(result, end_us - 1)


def _truncate(us: Ints, digits: npt.NDArray[np.uint8]) -> Ints:
    unit = 10 ** (6 - digits.astype(np.int64))
    return us // unit * unit


def draw_events(
    rng: np.random.Generator,
    world: World,
    shares: SimulationShares,
    limits: Limits,
    *,
    size: int,
    offered: int,
    spare_ids: int,
    users: int,
    click_rate: float,
    hourly_weights: Sequence[Sequence[float]],
    start_us: int,
    end_us: int,
) -> Events:
    """Draw ``size`` events between start and end (microseconds): impressions and clicks, some late, some with wrong clocks.

    ``offered`` is the number of lines that the shares refer to, ``hourly_weights`` the daily curve of each region.
    """
    clicks = min(round(size * click_rate / (1 + click_rate)), size // 2)
    shown = size - clicks
    region = (rng.random(shown) >= _SHARE_OF_REGION[0]).astype(np.uint8)
    event_us = _moments(rng, region, hourly_weights, start_us, end_us)
    digits = _DIGITS[rng.integers(0, len(_DIGITS), size)]
    event_us = _truncate(event_us, digits[:shown])
    ad = np.searchsorted(world.ad_cdf, rng.random(shown), side="right").astype(np.int32)
    draw = rng.random(shown)
    user = (draw * draw * users).astype(np.int32) * len(REGIONS) + region
    placement = rng.integers(0, len(PLACEMENTS) * 2, shown)
    placement = np.where(placement < len(PLACEMENTS), placement, 1).astype(np.uint8)
    agent = rng.integers(0, len(PEOPLE_AGENTS), shown).astype(np.uint8)
    crawlers = np.flatnonzero(rng.random(shown) < shares.bots * offered / size)
    agent[crawlers] = len(PEOPLE_AGENTS) + rng.integers(0, len(CRAWLER_AGENTS), len(crawlers))

    impression = rng.permutation(shown)[:clicks].astype(np.int32)
    impressions = _Impressions(region, event_us, ad, user, digits[:shown])
    bursts, journeys = _gather(
        rng, impressions, impression, world, shares, offered=offered, users=users, start_us=start_us, end_us=end_us
    )

    # Where a campaign's billing changes, the impression nearest to that moment happens exactly then.
    campaign = world.campaign_of_ad[ad]
    for code, moment in world.switches.items():
        candidates = np.flatnonzero(campaign == code)
        if len(candidates):
            event_us[candidates[np.argmin(np.abs(event_us[candidates] - moment))]] = moment

    used = bursts + sum(map(len, journeys))
    gathered = np.zeros(shown, np.bool_)
    gathered[impression[:used]] = True
    gathered |= np.isin(event_us, list(world.switches.values()))
    shown_again = _pairs(rng, np.flatnonzero(~gathered), round(shares.repeats * offered * 0.6))
    for column in (region, ad, user, placement, agent):
        column[shown_again.later] = column[shown_again.first]
    event_us[shown_again.first] = _some_before_the_hour(event_us[shown_again.first], end_us)
    event_us[shown_again.later] = _after(rng, event_us[shown_again.first], IMPRESSION_WINDOW_US, end_us)
    digits[shown_again.first] = digits[shown_again.later] = 6

    draw = rng.random(clicks)
    click_us = event_us[impression] + ((2 + 6 * draw / (1.01 - draw)) * _SECOND_US).astype(np.int64)
    click_us = _truncate(click_us, digits[shown:])
    clicked_again = _pairs(rng, np.arange(used, clicks), round(shares.repeats * offered * 0.4))
    impression[clicked_again.later] = impression[clicked_again.first]
    click_us[clicked_again.first] = _some_before_the_hour(click_us[clicked_again.first], end_us)
    click_us[clicked_again.later] = _after(rng, click_us[clicked_again.first], CLICK_WINDOW_US, end_us)
    digits[shown:][clicked_again.first] = digits[shown:][clicked_again.later] = 6

    event_us = np.concatenate([event_us, click_us])
    received_us = _ceil_ms(event_us + _lag_us(rng.random(size)))
    special = rng.permutation(size)
    # Some touches and some first events of a repeat arrive late: they change what is billable and what has credit.
    preferred = np.concatenate(
        [shown + clicked_again.first[::4], shown_again.first[::8], *(shown + touched[:1] for touched in journeys[::3])]
    )
    # The clocks of a burst's clicks are right, so that their number stays the same.
    first, last = preferred[: round(shares.late * offered / 3)], np.arange(shown, shown + bursts)
    special = np.concatenate([first, special[~np.isin(special, first) & ~np.isin(special, last)], last])
    late, future, skewed = np.split(
        special[: round((shares.late + shares.future + shares.skewed) * offered)],
        np.cumsum([round(shares.late * offered), round(shares.future * offered)]),
    )
    received_us[late] = _late_arrival(rng, event_us[late], limits, end_us)
    skew_us = int(np.timedelta64(limits.future_skew) / _MICROSECONDS_OF_LIMIT)
    lead = ((rng.random(len(future)) ** 2) * 3 * HOUR_US).astype(np.int64) + skew_us + 1
    event_us[future] = received_us[future] + lead
    # One in eight of the allowed clocks is ahead by exactly the allowed skew.
    lead = np.where(np.arange(len(skewed)) % 8 == 0, skew_us, (rng.random(len(skewed)) * skew_us).astype(np.int64))
    event_us[skewed] = received_us[skewed] + lead
    digits[future] = digits[skewed] = 6

    price_micros = np.concatenate([rng.integers(80, 1200, shown) * 10_000, rng.integers(5, 180, clicks) * 10_000])
    odd = rng.random(size) < 0.2
    price_micros[odd] += rng.integers(0, 10_000, int(odd.sum()))
    has_price = rng.random(size) >= 0.01
    raw_ids = np.frombuffer(rng.bytes(16 * (size + spare_ids)), np.uint8).reshape(size + spare_ids, 16).copy()
    raw_ids[:, 8] = raw_ids[:, 8] & 0x3F | 0x80
    extra = rng.integers(0, 120, size)
    return Events(
        raw_ids=raw_ids,
        event_us=event_us,
        received_us=received_us,
        digits=digits,
        offset=rng.random(size) < 0.04,
        region=np.concatenate([region, region[impression]]),
        ad=np.concatenate([ad, ad[impression]]),
        user=np.concatenate([user, user[impression]]),
        impression=np.concatenate([np.full(shown, -1, np.int32), impression]),
        placement=np.concatenate([placement, placement[impression]]),
        agent=np.concatenate([agent, agent[impression]]),
        extra=np.where(extra < len(EXTRAS), extra, 0).astype(np.uint8),
        price_micros=np.where(has_price, price_micros, 0),
        has_price=has_price,
        has_region=rng.random(size) >= 0.15,
        journeys=[shown + touched for touched in journeys],
    )


@dataclass(frozen=True)
class _Impressions:
    """Columns of the impressions, which `_gather` changes in place."""

    region: npt.NDArray[np.uint8]
    event_us: Ints
    ad: npt.NDArray[np.int32]
    user: npt.NDArray[np.int32]
    digits: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Pairs:
    """Positions of events, and of the events that repeat them."""

    first: npt.NDArray[np.intp]
    later: npt.NDArray[np.intp]


def _gather(
    rng: np.random.Generator,
    shown: _Impressions,
    impression: npt.NDArray[np.int32],
    world: World,
    shares: SimulationShares,
    *,
    offered: int,
    users: int,
    start_us: int,
    end_us: int,
) -> tuple[int, list[npt.NDArray[np.intp]]]:
    """Turn the first clicked impressions into bursts and journeys. Returns the clicks of bursts, and those of each journey.

    A burst is 60 to 89 clicks of one user in an hour (one in four has 60, the limit); a journey 2 to 12 clicks of one user on one
    store's ads. Both take at most a quarter of the clicks.
    """
    clicks = len(impression)
    at = number = 0
    most = max(round(shares.click_bursts * offered), sum(_BURST_SIZES[:2])) if shares.click_bursts else 0
    while (size := _BURST_SIZES[number % len(_BURST_SIZES)]) + at <= min(most, clicks // 4):
        rows = impression[at : at + size]
        hours = max(1, (end_us - start_us) // HOUR_US)
        begin_us = start_us // HOUR_US * HOUR_US + int(rng.integers(0, hours)) * HOUR_US
        region = number % len(REGIONS)
        shown.region[rows] = region
        shown.user[rows] = int(rng.integers(0, users)) * len(REGIONS) + region
        shown.event_us[rows] = np.maximum(begin_us + rng.integers(0, 49 * _MINUTE_US, size), start_us)
        shown.digits[rows] = 6
        at += size
        number += 1
    bursts = at
    journeys = []
    wanted = bursts + min(round(shares.journeys * offered), clicks // 4)
    while at < wanted:
        size = min(2 + int(rng.random() ** 2 * 11), wanted - at)
        rows = impression[at : at + size]
        store = int(rng.integers(0, len(world.store_ids)))
        ads = np.flatnonzero(world.store_of_campaign[world.campaign_of_ad] == store)
        region = int(rng.integers(0, len(REGIONS)))
        shown.region[rows] = region
        shown.user[rows] = int(rng.integers(0, users)) * len(REGIONS) + region
        shown.ad[rows] = ads[rng.integers(0, len(ads), size)]
        shown.event_us[rows] = np.sort(rng.integers(start_us, end_us, size))
        shown.digits[rows] = 6
        journeys.append(np.arange(at, at + size))
        at += size
    return bursts, journeys


def _pairs(rng: np.random.Generator, among: npt.NDArray[np.intp], count: int) -> _Pairs:
    """Draw disjoint pairs: no event is both a first one and a repeat."""
    chosen = rng.permutation(among)[: 2 * min(count, len(among) // 4)]
    return _Pairs(chosen[0::2], chosen[1::2])


def _some_before_the_hour(first_us: Ints, end_us: int) -> Ints:
    """Move one in twelve to the last second of its hour, so that its repeat is at the start of the next hour."""
    edge_us = (first_us // HOUR_US + 1) * HOUR_US - _SECOND_US
    return np.where((np.arange(len(first_us)) % 12 == 5) & (edge_us < end_us - _SECOND_US), edge_us, first_us)


def _after(rng: np.random.Generator, first_us: Ints, window_us: int, end_us: int) -> Ints:
    """Draw the times of repeats: in the window and beyond, at its two ends and within a microsecond of them.

    No repeat is long after the end of the simulated time.
    """
    at_random = (rng.random(len(first_us)) * 1.5 * window_us).astype(np.int64)
    edges = np.array([0, 1, window_us - 1, window_us, window_us + 1, _SECOND_US, *[-1] * 6])[np.arange(len(first_us)) % 12]
    distance = np.where(edges >= 0, edges, at_random)
    return first_us + np.where(first_us + distance < end_us, distance, np.minimum(distance, _SECOND_US))


def _late_arrival(rng: np.random.Generator, event_us: Ints, limits: Limits, end_us: int) -> Ints:
    """Draw arrivals after the grace of the hour: most within hours, some days later, one in twenty exactly at its end.

    One in twenty arrives a millisecond before the end, so it is not late.
    """
    grace_us = int(np.timedelta64(limits.hour_grace) / _MICROSECONDS_OF_LIMIT)
    closes = (event_us // HOUR_US + 1) * HOUR_US + grace_us
    longest = np.clip(end_us - closes, HOUR_US, 2 * _DAY_US)
    draw = rng.random(len(event_us))
    arrival = _ceil_ms(closes + (draw * draw * draw * longest).astype(np.int64))
    kind = np.arange(len(event_us)) % 20
    return np.where(kind == 0, _ceil_ms(closes), np.where(kind == 1, closes // 1000 * 1000 - 1000, arrival))


@dataclass(frozen=True)
class Counts:
    """Numbers of lines by intent."""

    first_time: int
    same_file: int
    later_file: int
    days_later: int
    other_region: int
    conflict: int
    broken: int


def plan(offered: int, shares: SimulationShares) -> Counts:
    """Return how many of the offered lines have each intent."""
    resends = (shares.resend_same_file, shares.resend_later_file, shares.resend_days_later, shares.resend_other_region)
    extra = [round(share * offered) for share in (*resends, shares.conflict, shares.broken)]
    return Counts(offered - sum(extra), *extra)


def draw_lines(rng: np.random.Generator, events: Events, counts: Counts, users: int, end_us: int) -> Lines:
    """Draw the lines offered of these events: each once, and the resends, conflicts and broken lines."""
    size = counts.first_time
    repeats = counts.same_file + counts.later_file + counts.days_later + counts.other_region

    # Resends: any event may be sent again, even several times.
    resent = rng.integers(0, size, repeats)
    intent = np.repeat(
        np.array([SAME_FILE, LATER_FILE, DAYS_LATER, OTHER_REGION], np.uint8),
        [counts.same_file, counts.later_file, counts.days_later, counts.other_region],
    )
    early = np.flatnonzero(events.received_us < end_us - 26 * HOUR_US)
    in_days = np.flatnonzero(intent == DAYS_LATER)
    if len(early):
        resent[in_days] = early[rng.integers(0, len(early), len(in_days))]
    else:
        intent[in_days] = LATER_FILE
    draw = rng.random(repeats)
    lag = np.select(
        [intent == SAME_FILE, intent == LATER_FILE, intent == DAYS_LATER],
        [
            50_000 + draw * 10 * _SECOND_US,
            10 * _MINUTE_US + draw * draw * 5 * HOUR_US,
            _DAY_US + draw * np.clip(end_us - events.received_us[resent] - _DAY_US, HOUR_US, 2 * _DAY_US),
        ],
        default=50_000 + draw * draw * 10 * _MINUTE_US,
    ).astype(np.int64)
    resent_region = events.region[resent] ^ (intent == OTHER_REGION)

    # Conflicts: an event has at most one, so that variant 1 is one payload.
    clashing = rng.permutation(size)[: counts.conflict]
    number = np.arange(len(clashing))
    draw = rng.random(len(clashing))
    after = np.where(number % 4 == 0, draw * 2 * _DAY_US, 100_000 + draw * draw * 3 * HOUR_US).astype(np.int64)
    moved_us = np.where(number % 3 == 0, -HOUR_US * (1 + number % 5), 0)
    dearer = np.where(number % 3 == 1, 10_000 * (1 + number % 50), 0)
    other_user = np.where(number % 3 == 2, len(REGIONS), 0)
    clash_region = events.region[clashing] ^ (number % 6 == 5)
    # Late conflicts stay within the simulated time if it is long enough.
    after = np.minimum(after, np.maximum(end_us - events.received_us[clashing], HOUR_US))

    # Broken lines: half are failed attempts at an event that arrives well formed soon after, half never were an event.
    template = rng.integers(0, size, counts.broken)
    attempt = np.arange(counts.broken) % 2 == 0
    before = (100_000 + rng.random(counts.broken) * 20 * _SECOND_US).astype(np.int64)

    event = np.concatenate([np.arange(size), resent, clashing, template]).astype(np.int32)
    plain = size + repeats
    clash = slice(plain, plain + len(clashing))
    user = events.user[event]
    user[clash] = (user[clash] + other_user) % (users * len(REGIONS))
    price_micros = events.price_micros[event]
    price_micros[clash] += dearer
    has_price = events.has_price[event]
    has_price[clash] |= dearer > 0
    event_us = events.event_us[event]
    event_us[clash] += moved_us
    never_an_event = size + np.arange(counts.broken)
    identity = np.concatenate([event[: clash.stop], np.where(attempt, template, never_an_event)])
    received_us = events.received_us[event] + np.concatenate([np.zeros(size, np.int64), lag, after, -before])
    breakage = np.concatenate([np.full(clash.stop, -1), np.arange(counts.broken) // 2 % len(EVENT_BREAKAGES)])
    rest = np.repeat(np.array([CONFLICT, BROKEN], np.uint8), [len(clashing), counts.broken])
    return Lines(
        event=event,
        identity=identity.astype(np.int32),
        event_us=event_us,
        received_us=_ceil_ms(received_us),
        region=np.concatenate([events.region, resent_region, clash_region, events.region[template]]).astype(np.uint8),
        user=user,
        price_micros=price_micros,
        has_price=has_price,
        variant=np.repeat(np.array([0, 1, 0], np.uint8), [plain, len(clashing), counts.broken]),
        breakage=breakage.astype(np.int8),
        intent=np.concatenate([np.full(size, FIRST_TIME, np.uint8), intent, rest]),
    )
