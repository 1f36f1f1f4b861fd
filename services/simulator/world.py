"""The advertisers of a simulation: stores, campaigns and their validity ranges, ads, how popular each is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt

from services.simulator.truth import CampaignRow

REGIONS = ("eu-west", "us-east")
CURRENCIES = ("EUR", "USD", "GBP")
_STORES = (
    "Golden Wok",
    "Pizza Nova",
    "Café Lumière",
    "Green Bowl",
    "Sakura Sushi",
    "Taco Libre",
    "Burger Dock",
    "Nonna's Kitchen",
    "Falafel Corner",
    "Bombay Spice",
    "The Soup Bar",
    "Pho Garden",
    "Bagel & Co",
    "Kebab Haus",
    "Ocean Grill",
    "Sweet Crumbs",
)
_THEMES = ("Launch", "Lunch deals", "Weekend", "New customers", "Happy hour", "Free delivery", "Seasonal menu", "Come back")
_DAY_US = 86_400_000_000
_SECOND_US = 1_000_000


@dataclass(frozen=True)
class World:
    """Campaigns and ads by code (their position in these arrays).

    ``rows`` are the lines of the campaigns CSV; ``switches`` are the times (microseconds) at which the billing of some campaigns
    changes. ``ad_cdf`` is the cumulative popularity of the ads.
    """

    campaign_ids: list[str]
    ad_ids: list[str]
    store_ids: list[str]
    store_of_campaign: npt.NDArray[np.int32]
    currency_of_campaign: npt.NDArray[np.int64]
    campaign_of_ad: npt.NDArray[np.int32]
    ad_cdf: npt.NDArray[np.float64]
    rows: list[CampaignRow]
    switches: dict[int, int]

    @property
    def stores(self) -> dict[str, str]:
        """The store id of each campaign id."""
        return {name: self.store_ids[store] for name, store in zip(self.campaign_ids, self.store_of_campaign, strict=True)}

    def names(self) -> list[tuple[str, str, str]]:
        """Return (kind, id, name) of every store, campaign and ad."""
        stores = [_numbered(_STORES, number) for number in range(len(self.store_ids))]
        campaigns = [
            f"{stores[store]}: {_numbered(_THEMES, number)}"
            for store, number in zip(self.store_of_campaign, _places(self.store_of_campaign), strict=True)
        ]
        ads = [
            f"{campaigns[campaign]}, ad {number + 1}"
            for campaign, number in zip(self.campaign_of_ad, _places(self.campaign_of_ad), strict=True)
        ]
        kinds = (("store", self.store_ids, stores), ("campaign", self.campaign_ids, campaigns), ("ad", self.ad_ids, ads))
        return [(kind, one, name) for kind, ids, names in kinds for one, name in zip(ids, names, strict=True)]


def _numbered(names: Sequence[str], number: int) -> str:
    """Return the name at ``number``; beyond the last name they repeat with a number."""
    again, at = divmod(number, len(names))
    return f"{names[at]} {again + 1}" if again else names[at]


def _places(groups: npt.NDArray[np.int32]) -> list[int]:
    """Return for each member how many of its group are before it."""
    seen: dict[int, Iterator[int]] = defaultdict(count)
    return [next(seen[group]) for group in groups.tolist()]


def _zipf_cdf(size: int) -> npt.NDArray[np.float64]:
    """Return cumulative shares of ranks 1 to size; the share of rank r is proportional to 1 / r."""
    cumulative: npt.NDArray[np.float64] = np.cumsum(1.0 / np.arange(1, size + 1))
    return cumulative / float(cumulative[-1])


def make_world(rng: np.random.Generator, *, campaigns: int, ads: int, start_us: int, end_us: int) -> World:
    """Draw the advertisers of the time from start to end (microseconds).

    About 3 % of the campaigns (at least one of 8 or more) have no row in the CSV, 10 % change their billing model inside the time,
    and one ends inside it without a successor.
    """
    stores = max(1, campaigns * 2 // 3)
    campaign_ids = [f"c{number:05d}" for number in range(1, campaigns + 1)]
    store_ids = [f"s{number:05d}" for number in range(1, stores + 1)]
    store_of_campaign = np.concatenate([np.arange(stores), rng.integers(0, stores, campaigns - stores)])
    currency_of_campaign = rng.choice(3, campaigns, p=[0.45, 0.35, 0.20])
    campaign_of_ad = np.concatenate([np.arange(campaigns), rng.integers(0, campaigns, ads - campaigns)])
    campaign_of_ad = campaign_of_ad[rng.permutation(ads)]

    shuffled = [int(code) for code in rng.permutation(campaigns)]
    missing_count = max(1, round(campaigns * 0.03)) if campaigns >= 8 else 0
    switching_count = max(1, round(campaigns * 0.10)) if campaigns >= 4 else 0
    missing = set(shuffled[:missing_count])
    switching = set(shuffled[missing_count : missing_count + switching_count])
    ending = set(shuffled[missing_count + switching_count :][:1]) if campaigns >= 8 else set()

    rows: list[CampaignRow] = []
    switches: dict[int, int] = {}
    opening_us = start_us - 30 * _DAY_US
    budgets = rng.integers(20, 2_000, campaigns) * 1_000_000
    is_cpc = rng.random(campaigns) < 0.6
    moments = start_us + ((end_us - start_us) * (0.2 + 0.6 * rng.random(campaigns))).astype(np.int64)
    for code in range(campaigns):
        if code in missing:
            continue
        models = ("cpc", "cpm") if is_cpc[code] else ("cpm", "cpc")
        moment = int(moments[code]) // _SECOND_US * _SECOND_US
        ranges: list[tuple[str, int, int | None]] = [(models[0], opening_us, None)]
        if code in switching:
            switches[code] = moment
            ranges = [(models[0], opening_us, moment), (models[1], moment, None)]
        elif code in ending:
            ranges = [(models[0], opening_us, moment)]
        store, budget, currency = store_ids[store_of_campaign[code]], int(budgets[code]), CURRENCIES[currency_of_campaign[code]]
        rows += [CampaignRow(campaign_ids[code], store, model, budget, currency, begin, end) for model, begin, end in ranges]
    return World(
        campaign_ids=campaign_ids,
        ad_ids=[f"a{number:06d}" for number in range(1, ads + 1)],
        store_ids=store_ids,
        store_of_campaign=store_of_campaign.astype(np.int32),
        currency_of_campaign=currency_of_campaign.astype(np.int64),
        campaign_of_ad=campaign_of_ad.astype(np.int32),
        ad_cdf=_zipf_cdf(ads),
        rows=rows,
        switches=switches,
    )
