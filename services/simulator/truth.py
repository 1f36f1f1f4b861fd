"""Accounts generated records exactly, with code that shares nothing with the pipeline.

The rules of the input contract: records count in order of (file mtime, path, line number); an invalid record never claims an id;
the first valid record of an id is accepted; a later one is a duplicate if every field but ``received_at`` and ``region`` is the
same, and a conflict otherwise. An accepted event is billable or invalid traffic (`services.simulator.invalid`); orders are credited
to billable clicks (`services.simulator.credit`).
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from services.simulator.credit import FinalOrder, Touch
from services.simulator.invalid import BILLABLE, RULES, first_rule, is_crawler, over_click_rate, repeats

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Row = dict[str, Any]

VERSION = 2
HOUR_US = 3_600_000_000
NO_TIME = int(np.iinfo(np.int64).min)
"""The ``event_us`` of a record without a readable time."""

ACCEPTED, DUPLICATE, CONFLICT, REJECTED = range(4)
OUTCOMES = ("accepted", "duplicate", "conflict", "rejected")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_us(moment: datetime) -> int:
    """Return the microseconds since 1970-01-01T00:00:00Z of a time with a zone."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def rfc3339(us: int) -> str:
    """Format microseconds since the epoch as RFC 3339 in UTC, without a fraction of zero."""
    moment = _EPOCH + timedelta(microseconds=us)
    return moment.replace(tzinfo=None).isoformat() + "Z"


@dataclass(frozen=True)
class CampaignRow:
    """One line of the campaigns CSV, valid from ``valid_from_us`` to before ``valid_to_us`` (None: open)."""

    campaign_id: str
    store_id: str
    billing_model: str
    daily_budget_micros: int
    currency: str
    valid_from_us: int
    valid_to_us: int | None


@dataclass(frozen=True)
class EventLines:
    """Event lines in the order in which they count, as columns of one length.

    ``region``, ``campaign``, ``currency`` and ``agent`` are codes into the names that `account_events` gets, ``user`` and ``ad``
    any codes; ``id_high`` and ``id_low`` are the event id's 128 bits, which sort as its text does. ``event_us`` is NO_TIME if no
    time can be read. Two lines with the same ``identity`` are the same record iff their ``payload`` is equal. ``well_formed`` is
    False for a line that breaks the contract, apart from the rule about clocks in the future, which `classify` applies. Such a line
    needs only a region and a time. ``source``: where each line was offered, if not in its region, as a code into ``sources``.
    """

    region: npt.NDArray[np.integer[Any]]
    event_us: Ints
    received_us: Ints
    well_formed: Bools
    identity: npt.NDArray[np.integer[Any]]
    payload: npt.NDArray[np.integer[Any]]
    campaign: npt.NDArray[np.integer[Any]]
    currency: npt.NDArray[np.integer[Any]]
    is_click: Bools
    user: npt.NDArray[np.integer[Any]]
    ad: npt.NDArray[np.integer[Any]]
    agent: npt.NDArray[np.integer[Any]]
    is_listed: Bools
    id_high: npt.NDArray[np.uint64]
    id_low: npt.NDArray[np.uint64]
    price_micros: Ints
    source: npt.NDArray[np.integer[Any]] | None = None

    def take(self, at: npt.NDArray[np.intp]) -> EventLines:
        """Return the lines at these positions."""
        taken: dict[str, Any] = {name: column[at] for name, column in vars(self).items() if column is not None}
        return EventLines(**taken)


@dataclass(frozen=True)
class Limits:
    """The settings that the truth depends on."""

    future_skew: timedelta = timedelta(minutes=5)
    hour_grace: timedelta = timedelta(minutes=15)


@dataclass(frozen=True)
class EventTruth:
    """Rows per region and hour, rows per campaign, region, hour and currency, per billing day, and their sums.

    ``touches`` are the positions of the billable clicks among the lines.
    """

    accounting: list[Row]
    campaign_hours: list[Row]
    billing: list[Row]
    totals: Row
    touches: npt.NDArray[np.intp]


def classify(lines: EventLines, future_skew: timedelta) -> npt.NDArray[np.uint8]:
    """Return the outcome of each line: ACCEPTED, DUPLICATE, CONFLICT or REJECTED."""
    skew_us = future_skew // timedelta(microseconds=1)
    valid = np.flatnonzero(lines.well_formed & (lines.event_us <= lines.received_us + skew_us))
    outcome = np.full(len(lines.region), REJECTED, np.uint8)
    if len(valid) == 0:
        return outcome
    by_identity = valid[np.argsort(lines.identity[valid], kind="stable")]
    identity, payload = lines.identity[by_identity], lines.payload[by_identity]
    is_first = np.ones(len(by_identity), np.bool_)
    is_first[1:] = identity[1:] != identity[:-1]
    first_of_group = np.maximum.accumulate(np.where(is_first, np.arange(len(by_identity)), 0))
    same = payload == payload[first_of_group]
    outcome[by_identity] = np.where(is_first, ACCEPTED, np.where(same, DUPLICATE, CONFLICT))
    return outcome


def _billing(lines: EventLines, at: Ints, campaigns: Sequence[str], rows: Sequence[CampaignRow]) -> tuple[Bools, Bools]:
    """Return whether a cpc row covers the lines at these positions, and whether a cpm row does (neither: unpriced)."""
    ranges: dict[str, list[CampaignRow]] = {}
    for row in sorted(rows, key=lambda r: (r.campaign_id, r.valid_from_us)):
        ranges.setdefault(row.campaign_id, []).append(row)
    campaign, event_us = lines.campaign[at], lines.event_us[at]
    covered = {model: np.zeros(len(at), np.bool_) for model in ("cpc", "cpm")}
    for level in range(max((len(found) for found in ranges.values()), default=0)):
        begin = np.zeros(len(campaigns), np.int64)
        end = np.zeros(len(campaigns), np.int64)
        is_cpc = np.zeros(len(campaigns), np.bool_)
        for code, name in enumerate(campaigns):
            if level < len(ranges.get(name, [])):
                row = ranges[name][level]
                begin[code], is_cpc[code] = row.valid_from_us, row.billing_model == "cpc"
                end[code] = np.iinfo(np.int64).max if row.valid_to_us is None else row.valid_to_us
        inside = (begin[campaign] <= event_us) & (event_us < end[campaign])
        covered["cpc"] |= inside & is_cpc[campaign]
        covered["cpm"] |= inside & ~is_cpc[campaign]
    return covered["cpc"], covered["cpm"]


def _sums(group: npt.NDArray[np.intp], values: Ints, groups: int) -> list[int]:
    """Return exact integer sums of values by group number."""
    result = np.zeros(groups, np.int64)
    np.add.at(result, group, values)
    return [int(value) for value in result]


def _counts(group: npt.NDArray[np.intp], mask: Bools, groups: int) -> list[int]:
    return [int(value) for value in np.bincount(group[mask], minlength=groups)]


def account_events(
    lines: EventLines,
    *,
    regions: Sequence[str],
    campaigns: Sequence[str],
    currencies: Sequence[str],
    agents: Sequence[str],
    stores: Mapping[str, str],
    campaign_rows: Sequence[CampaignRow],
    limits: Limits,
    sources: Sequence[str] | None = None,
) -> EventTruth:
    """Account event lines: counts per outcome, late, invalid, unpriced, and what each campaign owes in nanos.

    A cpc click costs price_micros x 1000 nanos, a cpm impression price_micros nanos, anything else nothing. Invalid traffic is
    counted apart, with what it would have cost. ``stores`` names each campaign's store. If the lines have a ``source``, the region
    of the accounting is its name in ``sources``.
    """
    outcome = classify(lines, limits.future_skew)
    hour = np.where(lines.event_us == NO_TIME, -1, lines.event_us // HOUR_US)
    taken = np.flatnonzero(outcome == ACCEPTED)
    is_cpc, is_cpm = _billing(lines, taken, campaigns, campaign_rows)
    is_click, price = lines.is_click[taken], lines.price_micros[taken]
    spend = np.where(is_click & is_cpc, price * 1000, np.where(~is_click & is_cpm, price, 0))
    grace_us = limits.hour_grace // timedelta(microseconds=1)
    late = lines.received_us[taken] >= (hour[taken] + 1) * HOUR_US + grace_us
    rule, hits = _judge(lines, taken, agents)
    invalid = rule != BILLABLE

    span = int(hour.max(initial=0)) + 2
    offered_by, names = (lines.region, regions) if lines.source is None else (lines.source, sources or regions)
    keys, group = np.unique(offered_by * np.int64(span) + hour + 1, return_inverse=True)
    counts = {"offered": _counts(group, np.ones(len(group), np.bool_), len(keys))}
    counts |= {name: _counts(group, outcome == code, len(keys)) for code, name in enumerate(OUTCOMES)}
    parts = {"late": late, "unpriced": ~(is_cpc | is_cpm), "invalid_traffic": invalid}
    counts |= {name: _counts(group[taken], mask, len(keys)) for name, mask in parts.items()}
    accounting: list[Row] = []
    for index, key in enumerate(keys):
        name_code, hour_number = divmod(int(key), span)
        event_hour = None if hour_number == 0 else rfc3339((hour_number - 1) * HOUR_US)
        measured = {name: values[index] for name, values in counts.items()}
        accounting.append({"region": names[name_code], "event_hour": event_hour, **measured})

    combined = (lines.campaign[taken].astype(np.int64) * len(regions) + lines.region[taken]) * span + hour[taken]
    keys, group = np.unique(combined * len(currencies) + lines.currency[taken], return_inverse=True)
    measures: dict[str, list[int]] = {
        "impressions": _counts(group, ~is_click & ~invalid, len(keys)),
        "clicks": _counts(group, is_click & ~invalid, len(keys)),
        "spend_nanos": _sums(group, np.where(invalid, 0, spend), len(keys)),
        "invalid_impressions": _counts(group, ~is_click & invalid, len(keys)),
        "invalid_clicks": _counts(group, is_click & invalid, len(keys)),
        "invalid_spend_nanos": _sums(group, np.where(invalid, spend, 0), len(keys)),
    }
    campaign_hours: list[Row] = []
    for index, key in enumerate(keys):
        rest, currency_code = divmod(int(key), len(currencies))
        rest, hour_number = divmod(rest, span)
        campaign_code, region_code = divmod(rest, len(regions))
        campaign_hours.append(
            {
                "campaign_id": campaigns[campaign_code],
                "region": regions[region_code],
                "event_hour": rfc3339(hour_number * HOUR_US),
                "currency": currencies[currency_code],
                **{name: values[index] for name, values in measures.items()},
            }
        )

    accounting.sort(key=lambda r: (r["region"], r["event_hour"] or ""))
    campaign_hours.sort(key=lambda r: (r["campaign_id"], r["region"], r["event_hour"], r["currency"]))
    totals: Row = {name: sum(values) for name, values in counts.items()}
    totals |= {name: sum(row[name] for row in campaign_hours) for name in measures if "spend" not in name}
    for name in ("spend_nanos", "invalid_spend_nanos"):
        by_currency: Counter[str] = Counter()
        for row in campaign_hours:
            by_currency[row["currency"]] += row[name]
        totals[f"{name}_by_currency"] = dict(sorted(by_currency.items()))
    is_bot = hits["crawler_user_agent"]
    totals |= {
        "bot_impressions": int((is_bot & ~is_click).sum()),
        "bot_clicks": int((is_bot & is_click).sum()),
        "invalid_by_rule": {name: int((rule == number).sum()) for number, name in enumerate(RULES)},
        "hits_by_rule": {name: int(mask.sum()) for name, mask in hits.items()},
    }
    touches = taken[is_click & ~invalid]
    return EventTruth(accounting, campaign_hours, _billing_days(campaign_hours, stores), totals, touches)


def _judge(lines: EventLines, taken: Ints, agents: Sequence[str]) -> tuple[npt.NDArray[np.int8], dict[str, Bools]]:
    """Return for each accepted line the number of the rule that makes it invalid traffic, and the hits of each rule."""
    crawler = np.array([is_crawler(name) for name in agents])
    user, is_click, event_us = lines.user[taken], lines.is_click[taken], lines.event_us[taken]
    again = repeats(user, lines.ad[taken], is_click, event_us, lines.id_high[taken], lines.id_low[taken])
    masks = (
        crawler[lines.agent[taken]],
        lines.is_listed[taken],
        again & is_click,
        again & ~is_click,
        over_click_rate(user, is_click, event_us),
    )
    return first_rule(masks), dict(zip(RULES, masks, strict=True))


def to_micros(nanos: int) -> int:
    """Round nanos to micros, half away from zero."""
    return (nanos + 500) // 1000 if nanos >= 0 else -((-nanos + 500) // 1000)


def _billing_days(campaign_hours: Sequence[Row], stores: Mapping[str, str]) -> list[Row]:
    """Return the bill of each day, campaign, store and currency: its spend, rounded once."""
    nanos: Counter[tuple[str, str, str, str]] = Counter()
    for row in campaign_hours:
        nanos[row["event_hour"][:10], row["campaign_id"], stores[row["campaign_id"]], row["currency"]] += row["spend_nanos"]
    names = ("event_date", "campaign_id", "store_id", "currency")
    return [dict(zip(names, key, strict=True)) | {"spend_micros": to_micros(value)} for key, value in sorted(nanos.items())]


class OrderTruth:
    """Counts order records, which are added in the order in which they count."""

    def __init__(self) -> None:
        self._accounting: dict[str, Counter[str]] = {}
        self._facts: dict[str, tuple[str, str, str, int, str]] = {}
        self._statuses: dict[str, set[str]] = {}

    def add(self, region: str, record: Mapping[str, Any] | None) -> str:
        """Count one record of a region's folder (None: it breaks the contract); returns its outcome.

        A new (order_id, status) is accepted if the order's other facts are those seen before.
        """
        outcome = self._outcome(record)
        counts = self._accounting.setdefault(region, Counter())
        counts["offered"] += 1
        counts[outcome] += 1
        return outcome

    def _outcome(self, record: Mapping[str, Any] | None) -> str:
        if record is None:
            return "rejected"
        order_id, status = record["order_id"], record["status"]
        facts = (record["order_time"], record["user_id"], record["store_id"], record["total_micros"], record["currency"])
        if self._facts.setdefault(order_id, facts) != facts:
            return "conflict"
        statuses = self._statuses.setdefault(order_id, set())
        if status in statuses:
            return "duplicate"
        statuses.add(status)
        return "accepted"

    def final_orders(self) -> list[FinalOrder]:
        """Return every accepted order with its final status."""
        result = []
        for order_id, statuses in self._statuses.items():
            order_time, user_id, store_id, micros, currency = self._facts[order_id]
            order_us, is_placed = to_us(datetime.fromisoformat(order_time)), "cancelled" not in statuses
            result.append(FinalOrder(order_id, order_us, user_id, store_id, micros, currency, is_placed))
        return result

    def as_dict(self) -> Row:
        """Return the accounting per region, orders by final status (cancelled is final) and their totals in micros."""
        final: Counter[str] = Counter()
        totals: dict[str, Counter[str]] = {}
        for order in self.final_orders():
            status = "placed" if order.is_placed else "cancelled"
            final[status] += 1
            totals.setdefault(order.currency, Counter())[status] += order.total_micros
        return {
            "accounting": [
                {"region": region, "offered": counts["offered"], **{name: counts[name] for name in OUTCOMES}}
                for region, counts in sorted(self._accounting.items())
            ],
            "placed": final["placed"],
            "cancelled": final["cancelled"],
            "total_micros_by_currency_and_status": {
                currency: {status: sums[status] for status in ("placed", "cancelled")} for currency, sums in sorted(totals.items())
            },
        }


def touches_by_journey(
    lines: EventLines,
    at: npt.NDArray[np.intp],
    campaigns: Sequence[str],
    stores: Mapping[str, str],
    user_name: Callable[[int], str],
) -> dict[tuple[str, str], list[Touch]]:
    """Return the clicks at these positions by (user_id, store_id)."""
    result: dict[tuple[str, str], list[Touch]] = {}
    columns = (lines.user, lines.campaign, lines.event_us, lines.id_high, lines.id_low)
    for user, campaign, event_us, high, low in zip(*(column[at].tolist() for column in columns), strict=True):
        name = campaigns[campaign]
        touch = Touch(event_us, str(uuid.UUID(int=high << 64 | low)), name)
        result.setdefault((user_name(user), stores[name]), []).append(touch)
    return result


def _block(parts: Mapping[str, str]) -> str:
    return "{\n" + ",\n".join(f' "{name}": {text}' for name, text in parts.items()) + "\n}"


@dataclass(frozen=True)
class Truth:
    """The result that an exact accounting of generated records must have.

    ``accounting``: region, event_hour (RFC 3339, None: no readable time), offered, accepted, duplicate, conflict,
    rejected, late, unpriced, invalid_traffic. ``campaign_hours``: campaign_id, region, event_hour, currency, impressions,
    clicks, spend_nanos (all net of invalid traffic), invalid_impressions, invalid_clicks, invalid_spend_nanos.
    ``totals``: the sums of both, and invalid traffic by the first rule that hit and by every rule that did. ``billing``:
    event_date, campaign_id, store_id, currency, spend_micros. ``orders``: see `OrderTruth.as_dict`. ``attribution``: see
    `services.simulator.credit.credit_orders`.
    """

    seed: int | None
    args: Row
    accounting: list[Row]
    campaign_hours: list[Row]
    billing: list[Row]
    totals: Row
    orders: Row
    attribution: Row

    def as_json(self) -> str:
        """Return the text of truth.json: one line a row, the same for the same truth."""

        def rows(items: Sequence[Row]) -> str:
            return "[\n" + ",\n".join("  " + json.dumps(item) for item in items) + "\n ]"

        parts = {
            "version": str(VERSION),
            "seed": json.dumps(self.seed),
            "args": json.dumps(self.args),
            "totals": json.dumps(self.totals),
            "orders": json.dumps(self.orders),
            "accounting": rows(self.accounting),
            "campaign_hours": rows(self.campaign_hours),
            "billing": rows(self.billing),
            "attribution": _block(
                {name: rows(part) if isinstance(part, list) else json.dumps(part) for name, part in self.attribution.items()}
            ),
        }
        return _block(parts) + "\n"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a truth.json; raises ValueError if it is of another version."""
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            raise ValueError(f"{path} is not a truth file of version {VERSION}")
        return cls(**content)
