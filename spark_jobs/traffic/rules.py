"""The rules of invalid traffic, and the judge of those rules that need only one record.

They find general invalid traffic as the IAB and the MRC define it: by lists (known crawlers, the operator's users and networks) and
by activity (repeats, clicks without an impression, too many clicks). The ingest applies the record rules; the review
(``traffic/review.py``) applies all rules to whole hours. docs/rules.md describes each entry of the file.

Spark's Python workers import this module, so it must not need a session.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_right
from datetime import datetime
from enum import StrEnum
from functools import cache, lru_cache
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Annotated

import crawleruseragents
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from spark_jobs.config import Settings
from spark_jobs.errors import RuleFileError
from spark_jobs.lake.landing_view import fresh_rules_path
from spark_jobs.rules.exempt import PLACEHOLDERS, ExemptUsers
from spark_jobs.rules.store import held_rules, keep_rule_set, read_rules

KIND = "invalid_traffic"
RULES_FILE = "invalid_traffic.toml"

RECORD_RULES = ("crawler_user_agent", "listed_user", "listed_network")
# Results name the rules in this order. The first one with mode 'invalid' that hits is the event's rule.
RULE_NAMES = (*RECORD_RULES, "repeat_click", "repeat_impression", "unmatched_click", "click_rate")
BITS = {name: 1 << at for at, name in enumerate(RULE_NAMES)}
"""A set of rules as a number: the sum of the bits of its rules."""

HOUR_SECONDS = 3600
Seconds = Annotated[int, Field(gt=0, le=30 * 24 * HOUR_SECONDS)]
_AGENTS_HELD = 65_536


class Mode(StrEnum):
    """What a rule does to an event that it hits: nothing, mark the event, or mark it and make it invalid."""

    OFF = "off"
    MARK = "mark"
    INVALID = "invalid"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(_Frozen):
    """A rule without further settings."""

    mode: Mode = Mode.INVALID


class WindowRule(_Frozen):
    """A rule that looks back ``window_seconds``."""

    mode: Mode = Mode.INVALID
    window_seconds: Seconds


class RepeatClick(WindowRule):
    """Repeated clicks, by default within an hour."""

    window_seconds: Seconds = HOUR_SECONDS


class RepeatImpression(WindowRule):
    """Repeated impressions, by default within a minute."""

    window_seconds: Seconds = 60


class UnmatchedClick(WindowRule):
    """Clicks without an impression, by default within a day; off by default."""

    mode: Mode = Mode.OFF
    window_seconds: Seconds = 24 * HOUR_SECONDS


class RateRule(_Frozen):
    """All clicks of a user in an hour (UTC) with more than ``clicks`` of them."""

    mode: Mode = Mode.INVALID
    clicks: int = Field(default=60, gt=0)


class _AllRules(_Frozen):
    crawler_user_agent: Rule = Rule()
    listed_user: Rule = Rule()
    listed_network: Rule = Rule()
    repeat_click: RepeatClick = RepeatClick()
    repeat_impression: RepeatImpression = RepeatImpression()
    unmatched_click: UnmatchedClick = UnmatchedClick()
    click_rate: RateRule = RateRule()


class RuleFile(_AllRules):
    """The content of the rule file. ``list_file`` names a list of user ids and networks, relative to the folder of the rules.

    ``exempt_users`` are ids that stand for "unknown": rules that compare the events of a user skip them.
    """

    list_file: str | None = None
    exempt_users: ExemptUsers = PLACEHOLDERS


class InvalidTrafficRules(_AllRules):
    """A whole rule set with the crawler patterns and the lists, so that its hash covers everything that decides a result."""

    crawler_source: str
    crawler_patterns: tuple[str, ...]
    users: tuple[str, ...]
    networks: tuple[str, ...]
    exempt_users: ExemptUsers

    def mode(self, name: str) -> Mode:
        """Return the mode of a rule."""
        return Mode(getattr(self, name).mode)

    def bits(self, *modes: Mode) -> int:
        """Return the rules with these modes as a number (BITS)."""
        return sum(bit for name, bit in BITS.items() if self.mode(name) in modes)

    @property
    def look_back_hours(self) -> int:
        """How many hours before an hour the rules read."""
        windows = (self.repeat_click, self.repeat_impression, self.unmatched_click)
        return max((-(-rule.window_seconds // HOUR_SECONDS) for rule in windows if rule.mode is not Mode.OFF), default=0)


@cache
def no_rules() -> InvalidTrafficRules:
    """Return the rules of a batch without a rule set: no event is invalid."""
    off = {name: getattr(RuleFile(), name).model_copy(update={"mode": Mode.OFF}) for name in RULE_NAMES}
    return InvalidTrafficRules(**off, crawler_source="", crawler_patterns=(), users=(), networks=(), exempt_users=())


def current_rules(settings: Settings) -> InvalidTrafficRules:
    """Read today's rules from their files. Raises RuleFileError, or StoreError if they are in a store that does not answer."""
    folder = fresh_rules_path(settings)
    file = read_rules(folder / RULES_FILE, RuleFile)
    users, networks = _read_list(folder / file.list_file) if file.list_file else ((), ())
    return InvalidTrafficRules(
        **{name: getattr(file, name) for name in (*RULE_NAMES, "exempt_users")},
        crawler_source=f"crawler-user-agents {version('crawler-user-agents')}",
        crawler_patterns=tuple(entry["pattern"] for entry in crawleruseragents.CRAWLER_USER_AGENTS_DATA),
        users=users,
        networks=networks,
    )


def keep_rules(settings: Settings, now: datetime) -> str:
    """Store today's rules in table `rule_sets`; return their hash."""
    return keep_rule_set(settings, KIND, current_rules(settings), now)


def rules_of(settings: Settings, rule_set: str | None) -> InvalidTrafficRules:
    """Return the rules with this hash; None: no rules."""
    return no_rules() if rule_set is None else held_rules(settings, rule_set, InvalidTrafficRules)


def _read_list(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read the user ids and the networks of a list, sorted. A comment starts with # at the start of a line or after a space."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RuleFileError(f"{path} cannot be read: {error}", hint=f"list_file of {RULES_FILE} names it") from None
    users: set[str] = set()
    networks: set[str] = set()
    for number, line in enumerate(lines, start=1):
        entry = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        if not entry:
            continue
        if "/" in entry and _address(entry.split("/")[0]) is not None:
            try:
                networks.add(str(ipaddress.ip_network(entry)))
            except ValueError as error:
                hint = "a network is as 192.0.2.0/24 or 2001:db8::/32"
                raise RuleFileError(f"{path}, line {number}: {error}", hint=hint) from None
        elif len(entry) > 128:
            raise RuleFileError(f"{path}, line {number}: a user id has at most 128 characters")
        else:
            users.add(entry)
    return tuple(sorted(users)), tuple(sorted(networks))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def is_in_listed_network(rules: InvalidTrafficRules, user_id: str) -> bool:
    """Return whether a user id is an address that the rule listed_network hits, and only that one because of the id."""
    is_on = rules.mode("listed_network") is not Mode.OFF
    return is_on and user_id not in rules.users and user_id in _Networks(rules.networks)


class RecordJudge:
    """Judges records by the rules that need no other record. It matches each distinct user agent once."""

    def __init__(self, rules: InvalidTrafficRules) -> None:
        on = {name for name in RECORD_RULES if rules.mode(name) is not Mode.OFF}
        patterns = rules.crawler_patterns if "crawler_user_agent" in on else ()
        self._crawler = re.compile("|".join(f"(?:{pattern})" for pattern in patterns)) if patterns else None
        self._users = pa.array(rules.users if "listed_user" in on else (), pa.string())
        self._networks = _Networks(rules.networks if "listed_network" in on else ())
        self._is_crawler = lru_cache(maxsize=_AGENTS_HELD)(self._matches)

    @property
    def looks_at_users(self) -> bool:
        """Whether a rule can hit a user id."""
        return bool(len(self._users) or self._networks)

    def _matches(self, agent: str) -> bool:
        return self._crawler is not None and self._crawler.search(agent) is not None

    def codes(self, events: pa.Table) -> npt.NDArray[np.int64]:
        """Return the rules that hit each event, as numbers (BITS), by its user_agent and user_id."""
        codes = np.zeros(events.num_rows, dtype=np.int64)
        if self._crawler is not None:
            agents = pc.unique(events["user_agent"]).drop_null()
            hit = pa.array([agent for agent in agents.to_pylist() if self._is_crawler(agent)], pa.string())
            _mark(codes, events["user_agent"], hit, "crawler_user_agent")
        _mark(codes, events["user_id"], self._users, "listed_user")
        if self._networks:
            inside = [user for user in pc.unique(events["user_id"]).drop_null().to_pylist() if user in self._networks]
            _mark(codes, events["user_id"], pa.array(inside, pa.string()), "listed_network")
        return codes


def _mark(codes: npt.NDArray[np.int64], column: pa.ChunkedArray, values: pa.Array, rule: str) -> None:
    if len(values):
        codes[pc.is_in(column, value_set=values).to_numpy()] |= BITS[rule]


class _Networks:
    """A set of texts: the addresses in some networks, as ascending ranges per version of the protocol."""

    def __init__(self, networks: tuple[str, ...]) -> None:
        parsed = [ipaddress.ip_network(text) for text in networks]
        self._ranges: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
        for found in sorted(parsed, key=lambda network: (int(network.network_address), network.prefixlen)):
            ranges = self._ranges[found.version]
            if not ranges or int(found.network_address) > ranges[-1][1]:  # networks overlap only if one contains the other
                ranges.append((int(found.network_address), int(found.broadcast_address)))

    def __bool__(self) -> bool:
        return any(self._ranges.values())

    def __contains__(self, text: str) -> bool:
        if not text[:1].isdigit() and ":" not in text:
            return False
        address = _address(text)
        if address is None:
            return False
        ranges = self._ranges[address.version]
        at = bisect_right(ranges, int(address), key=itemgetter(0)) - 1
        return at >= 0 and int(address) <= ranges[at][1]


@lru_cache(maxsize=4)
def judge_of(rules: InvalidTrafficRules) -> RecordJudge:
    """Return this process's judge of a rule set."""
    return RecordJudge(rules)


def marks(codes: npt.NDArray[np.int64], rules: InvalidTrafficRules) -> tuple[pa.Array, pa.Array]:
    """Return invalid_traffic_rule and invalid_traffic_rules of events by the rules that hit them; null where there is none."""
    invalid = rules.bits(Mode.INVALID)
    kinds, at = np.unique(codes, return_inverse=True)
    first, every = [], []
    for code in kinds.tolist():
        hits = [name for name, bit in BITS.items() if code & bit]
        first.append(next((name for name in hits if BITS[name] & invalid), None))
        every.append(hits or None)
    index = pa.array(at)
    return pc.take(pa.array(first, pa.string()), index), pc.take(pa.array(every, pa.list_(pa.string())), index)
