"""The rules of invalid traffic, and those of them that a record can be judged by alone.

General invalid traffic as the IAB and the MRC mean it: lists (known crawlers, what the operator lists) and rules of activity
(repeats, clicks without an impression, too many clicks). Record rules are judged at ingest; all of them by the review
(``traffic/review.py``), which sees the whole hour. docs/rules.md describes each entry of the file.

Runs in Spark's Python workers and must stay importable without a session.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_right
from datetime import datetime
from enum import StrEnum
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path

import crawleruseragents
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from spark_jobs.config import Settings
from spark_jobs.errors import RuleFileError
from spark_jobs.rules.exempt import PLACEHOLDERS, ExemptUsers
from spark_jobs.rules.store import held_rules, keep_rule_set, read_rules

KIND = "invalid_traffic"
RULES_FILE = "invalid_traffic.toml"

# In the order of their names in a result: the first with mode 'invalid' that hits is the event's rule.
RULE_NAMES = (
    *("crawler_user_agent", "listed_user", "listed_network", "repeat_click", "repeat_impression", "unmatched_click", "click_rate"),
)
RECORD_RULES = RULE_NAMES[:3]
BITS = {name: 1 << at for at, name in enumerate(RULE_NAMES)}
"""A set of rules as a number: the sum of the bits of its rules."""

HOUR_SECONDS = 3600
_LONGEST_SECONDS = 30 * 24 * HOUR_SECONDS
_AGENTS_HELD = 65_536


class Mode(StrEnum):
    """What a rule does: nothing; it is listed with the event; or it makes the event invalid, too."""

    OFF = "off"
    MARK = "mark"
    INVALID = "invalid"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(_Frozen):
    """A rule that has no more to it."""

    mode: Mode = Mode.INVALID


class WindowRule(_Frozen):
    """A rule that looks back. For how long, in seconds."""

    mode: Mode = Mode.INVALID
    window_seconds: int = Field(gt=0, le=_LONGEST_SECONDS)


class RepeatClick(WindowRule):
    """Clicks: an hour, unless it says otherwise."""

    window_seconds: int = Field(default=HOUR_SECONDS, gt=0, le=_LONGEST_SECONDS)


class RepeatImpression(WindowRule):
    """Impressions: a minute."""

    window_seconds: int = Field(default=60, gt=0, le=_LONGEST_SECONDS)


class UnmatchedClick(WindowRule):
    """Clicks without an impression: off, and a day."""

    mode: Mode = Mode.OFF
    window_seconds: int = Field(default=24 * HOUR_SECONDS, gt=0, le=_LONGEST_SECONDS)


class RateRule(_Frozen):
    """More clicks of a user within an hour (UTC) than ``clicks`` are invalid, all of them."""

    mode: Mode = Mode.INVALID
    clicks: int = Field(default=60, gt=0)


class RuleFile(_Frozen):
    """What the rule file says. ``list_file`` is a path from the folder of the rules: user ids and networks, one a line.

    ``exempt_users`` share an id that stands for "unknown": rules that compare the events of a user leave them alone.
    """

    crawler_user_agent: Rule = Rule()
    listed_user: Rule = Rule()
    listed_network: Rule = Rule()
    repeat_click: RepeatClick = RepeatClick()
    repeat_impression: RepeatImpression = RepeatImpression()
    unmatched_click: UnmatchedClick = UnmatchedClick()
    click_rate: RateRule = RateRule()
    list_file: str | None = None
    exempt_users: ExemptUsers = PLACEHOLDERS


class InvalidTrafficRules(_Frozen):
    """A rule set, whole: with the patterns of crawlers and the lists, so that its hash says all and it can be judged by again."""

    crawler_user_agent: Rule
    listed_user: Rule
    listed_network: Rule
    repeat_click: RepeatClick
    repeat_impression: RepeatImpression
    unmatched_click: UnmatchedClick
    click_rate: RateRule
    crawler_source: str
    crawler_patterns: tuple[str, ...]
    users: tuple[str, ...]
    networks: tuple[str, ...]
    exempt_users: ExemptUsers

    def mode(self, name: str) -> Mode:
        """The mode of a rule."""
        return Mode(getattr(self, name).mode)

    def bits(self, *modes: Mode) -> int:
        """The rules of these modes as a number."""
        return sum(bit for name, bit in BITS.items() if self.mode(name) in modes)

    @property
    def look_back_hours(self) -> int:
        """How many hours before an hour its rules look at."""
        windows = (self.repeat_click, self.repeat_impression, self.unmatched_click)
        return max((-(-rule.window_seconds // HOUR_SECONDS) for rule in windows if rule.mode is not Mode.OFF), default=0)


@cache
def no_rules() -> InvalidTrafficRules:
    """What a batch without a rule set is judged by: no event is invalid."""
    off = {name: getattr(RuleFile(), name).model_copy(update={"mode": Mode.OFF}) for name in RULE_NAMES}
    return InvalidTrafficRules(**off, crawler_source="", crawler_patterns=(), users=(), networks=(), exempt_users=())


def current_rules(settings: Settings) -> InvalidTrafficRules:
    """The rules as the files say them now. Raises RuleFileError."""
    path = settings.rules_path / RULES_FILE
    told = read_rules(path, RuleFile)
    users, networks = _read_list(settings.rules_path / told.list_file) if told.list_file else ((), ())
    data = crawleruseragents.CRAWLER_USER_AGENTS_DATA
    return InvalidTrafficRules(
        **{name: getattr(told, name) for name in RULE_NAMES},
        crawler_source=f"crawler-user-agents {version('crawler-user-agents')}",
        crawler_patterns=tuple(entry["pattern"] for entry in data),
        users=users,
        networks=networks,
        exempt_users=told.exempt_users,
    )


def keep_rules(settings: Settings, now: datetime) -> str:
    """The hash of the rules as the files say them now, which table `rule_sets` then holds."""
    return keep_rule_set(settings, KIND, current_rules(settings), now)


def rules_of(settings: Settings, rule_set: str | None) -> InvalidTrafficRules:
    """The rules with this hash; none for none."""
    return no_rules() if rule_set is None else held_rules(settings, rule_set, InvalidTrafficRules)


def _read_list(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(user ids, networks) of a list, each in order and once. A comment starts with # where a line begins, or behind a space."""
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
        if "/" in entry and _is_address(entry.split("/")[0]):
            try:
                networks.add(str(ipaddress.ip_network(entry)))
            except ValueError as error:
                raise RuleFileError(
                    f"{path}, line {number}: {error}", hint="a network is as 192.0.2.0/24 or 2001:db8::/32"
                ) from None
        elif len(entry) > 128:
            raise RuleFileError(f"{path}, line {number}: a user id has at most 128 characters")
        else:
            users.add(entry)
    return tuple(sorted(users)), tuple(sorted(networks))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


class RecordJudge:
    """Judges records by the rules that need no other record. Each distinct user agent is looked at once."""

    def __init__(self, rules: InvalidTrafficRules) -> None:
        on = {name for name in RECORD_RULES if rules.mode(name) is not Mode.OFF}
        patterns = rules.crawler_patterns if "crawler_user_agent" in on else ()
        self._crawler = re.compile("|".join(f"(?:{pattern})" for pattern in patterns)) if patterns else None
        self._users = pa.array(rules.users if "listed_user" in on else (), pa.string())
        self._networks = _Networks(rules.networks if "listed_network" in on else ())
        self._is_crawler = lru_cache(maxsize=_AGENTS_HELD)(self._matches)

    @property
    def looks_at_users(self) -> bool:
        """Whether a user id can hit."""
        return bool(len(self._users) or self._networks)

    def _matches(self, agent: str) -> bool:
        return self._crawler is not None and self._crawler.search(agent) is not None

    def codes(self, events: pa.Table) -> npt.NDArray[np.int64]:
        """The rules that hit each event, as numbers (BITS), from its user_agent and user_id."""
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
    """Which texts are addresses within some networks: those of a version as ranges that do not overlap, in order."""

    def __init__(self, networks: tuple[str, ...]) -> None:
        self._ranges: dict[int, tuple[list[int], list[int]]] = {}
        parsed = [ipaddress.ip_network(text) for text in networks]
        for number in (4, 6):
            own = sorted((int(n.network_address), int(n.broadcast_address)) for n in parsed if n.version == number)
            starts: list[int] = []
            ends: list[int] = []
            for start, end in own:  # networks overlap only by one holding the other
                if not ends or start > ends[-1]:
                    starts.append(start)
                    ends.append(end)
            self._ranges[number] = (starts, ends)
        self._any = bool(networks)

    def __bool__(self) -> bool:
        return self._any

    def __contains__(self, text: str) -> bool:
        if not text[:1].isdigit() and ":" not in text:
            return False
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return False
        starts, ends = self._ranges[address.version]
        at = bisect_right(starts, int(address)) - 1
        return at >= 0 and int(address) <= ends[at]


@lru_cache(maxsize=4)
def judge_of(rules: InvalidTrafficRules) -> RecordJudge:
    """The judge of a rule set in this process."""
    return RecordJudge(rules)


def marks(codes: npt.NDArray[np.int64], rules: InvalidTrafficRules) -> tuple[pa.Array, pa.Array]:
    """(invalid_traffic_rule, invalid_traffic_rules) of events by the rules that hit them: null where there is none."""
    invalid = rules.bits(Mode.INVALID)
    kinds, at = np.unique(codes, return_inverse=True)
    first, every = [], []
    for code in kinds.tolist():
        hits = [name for name, bit in BITS.items() if code & bit]
        first.append(next((name for name in hits if BITS[name] & invalid), None))
        every.append(hits or None)
    index = pa.array(at)
    return pc.take(pa.array(first, pa.string()), index), pc.take(pa.array(every, pa.list_(pa.string())), index)
