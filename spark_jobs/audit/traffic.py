"""Which accepted events are invalid traffic, told by code that shares nothing with the ingest and the review.

An hour that was reviewed is judged by all rules of its last review's rule set, over the batches that the review has seen; what
came later, and hours that no review has seen, by the record rules of each batch's plan. An event is a repeat if another of the
same user, ad and type lies less than the window before it; of several at the same moment all but the first id are.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from spark_jobs.errors import TableCorruptionError
from spark_jobs.lake.tables import RULE_SETS, TRAFFIC_REVIEWS

if TYPE_CHECKING:
    from spark_jobs.audit.truth import Recount

_ORDER = (
    *("crawler_user_agent", "listed_user", "listed_network", "repeat_click", "repeat_impression", "unmatched_click", "click_rate"),
)
_NAMES = ", ".join(f"'{name}'" for name in _ORDER)
_WINDOWS = ("repeat_click", "repeat_impression", "unmatched_click")


class _RuleSet:
    """A rule set as table `rule_sets` holds it."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.on = {name for name in _ORDER if content[name]["mode"] != "off"}
        self.invalid = {name for name in _ORDER if content[name]["mode"] == "invalid"}
        self._patterns: list[re.Pattern[str]] | None = None
        self._crawlers: dict[str, bool] = {}
        self._users = set(content["users"])
        self._exempt = {_folded(user) for user in content.get("exempt_users", ())}  # rule sets of old have none
        self._networks = [ipaddress.ip_network(text) for text in content["networks"]]

    @property
    def look_back_hours(self) -> int:
        """How many hours before an hour its windows reach into."""
        seconds = [self.content[name]["window_seconds"] for name in _WINDOWS if name in self.on]
        return max(((length + 3599) // 3600 for length in seconds), default=0)

    def window_us(self, name: str) -> int:
        """The window of a rule in microseconds."""
        return int(self.content[name]["window_seconds"]) * 1_000_000

    def is_crawler(self, agent: str) -> bool:
        """Whether any pattern is found in a user agent."""
        if agent not in self._crawlers:
            if self._patterns is None:
                self._patterns = [re.compile(pattern) for pattern in self.content["crawler_patterns"]]
            self._crawlers[agent] = any(pattern.search(agent) for pattern in self._patterns)
        return self._crawlers[agent]

    def is_in_network(self, user: str) -> bool:
        """Whether a user id is an address within a listed network."""
        try:
            address = ipaddress.ip_address(user)
        except ValueError:
            return False
        return any(address in network for network in self._networks)

    def exempt_among(self, users: Collection[str]) -> list[str]:
        """The users that stand for nobody known."""
        return [user for user in users if _folded(user) in self._exempt]

    def hits_of(self, name: str, values: Collection[str]) -> list[str]:
        """The agents, or users, that a record rule hits."""
        if name not in self.on:
            return []
        if name == "crawler_user_agent":
            return [value for value in values if self.is_crawler(value)]
        if name == "listed_user":
            return [value for value in values if value in self._users]
        return [value for value in values if self._networks and self.is_in_network(value)]


def _folded(user: str) -> str:
    """A user id without the blanks around it and in small letters, as far as these are ASCII."""
    return "".join(letter.lower() if letter.isascii() else letter for letter in user.strip(" "))


class TrafficJudge:
    """Judges the accepted records of a recount. ``wide``: the hours that must be counted for some to be judged."""

    def __init__(self, recount: Recount) -> None:
        self._recount = recount
        self._lake = recount.lake
        self._sets: dict[str, _RuleSet] = {}
        self._lake.execute(
            f"""
            create temp table reviews as
            select hour_of(epoch_us(event_hour)) as hour, arg_max(rule_set, reviewed_at) as rule_set,
                arg_max(events_version, reviewed_at) as events_version
            from {recount.scan(TRAFFIC_REVIEWS.name)} group by all
            """
        )
        self._reviewed: dict[int, str] = dict(recount.rows("select hour, rule_set from reviews"))

    def _set(self, name: str) -> _RuleSet:
        if name not in self._sets:
            found = self._lake.execute(
                f"select content from {self._recount.scan(RULE_SETS.name)} where rule_set = ? limit 1", [name]
            ).fetchone()
            if found is None:
                raise TableCorruptionError(f"table rule_sets does not have the rule set {name}, by which events were judged")
            self._sets[name] = _RuleSet(json.loads(found[0]))
        return self._sets[name]

    def wide(self, hours: Collection[int]) -> set[int]:
        """``hours``, and those that the rules of the reviewed ones look back to."""
        found = set(hours)
        for hour in hours:
            if hour in self._reviewed:
                found.update(range(hour - self._set(self._reviewed[hour]).look_back_hours, hour))
        return found

    def judge(self, hours: Collection[int]) -> None:
        """Make table `marks` from table `counted`: o, line, rule and rules of the accepted records of ``hours`` that a rule hits;
        and table `rule_of_hour`: hour, rule_set and events_version of those that a review holds for."""
        keep, lake = self._recount.keep, self._lake
        keep("asked", pa.table({"hour": pa.array(sorted(hours), pa.int64())}))
        lake.execute(
            """
            create or replace temp table hits (o bigint, line bigint, rule_set varchar, rule varchar);
            create or replace temp view accepted as
            select counted.*, version, batches.rule_set as plan_rules from counted join batches using (b)
            where outcome = 'accepted' and state != 'pending';
            create or replace temp table rule_of_hour as select * from reviews where hour in (from asked)
            """
        )
        self._judge_by_plans()
        for number, (rule_set, version, own) in enumerate(self._rounds()):
            self._judge_round(self._set(rule_set), rule_set, version, own, number)
        used = sorted({name for (name,) in self._recount.rows("select distinct rule_set from hits")})
        invalid = [(name, rule) for name in used for rule in sorted(self._set(name).invalid)]
        keep(
            "invalid_rules",
            pa.table(
                {"rule_set": pa.array([n for n, _ in invalid], pa.string()), "rule": pa.array([r for _, r in invalid], pa.string())}
            ),
        )
        position = f"list_position([{_NAMES}], rule)"
        lake.execute(
            f"""
            create or replace temp table marks as
            select o, line, arg_min(if(i.rule is null, null, h.rule), {position.replace("rule)", "h.rule)")})
                    filter (i.rule is not null) as rule,
                list(h.rule order by {position.replace("rule)", "h.rule)")}) as rules
            from hits h left join invalid_rules i on i.rule_set = h.rule_set and i.rule = h.rule
            group by o, line
            """
        )

    # --- one rule after the other

    def _judge_by_plans(self) -> None:
        """Records that no review has seen: by the record rules of their batches."""
        where = """
            hour in (from asked) and plan_rules is not null
            and not exists (from rule_of_hour r where r.hour = a.hour and a.version <= r.events_version)
        """
        self._lake.execute(f"create or replace temp table unseen as select * from accepted a where {where}")
        for (rule_set,) in self._recount.rows("select distinct plan_rules from unseen"):
            self._record_rules(self._set(rule_set), rule_set, f"(from unseen where plan_rules = '{rule_set}')")

    def _rounds(self) -> list[tuple[str, int | None, list[int]]]:
        """(rule set, version, hours): hours that are judged together. A version is only named where something came behind it."""
        sets = sorted({name for (name,) in self._recount.rows("select distinct rule_set from rule_of_hour")})
        self._recount.keep(
            "reaches",
            pa.table(
                {
                    "rule_set": pa.array(sets, pa.string()),
                    "hours": pa.array([self._set(name).look_back_hours for name in sets], pa.int64()),
                }
            ),
        )
        return self._recount.rows(
            """
            select rule_set, judged_version, list(hour) from (
                select r.hour, r.rule_set,
                    if(coalesce(max(n.version), -1) <= r.events_version, null, r.events_version) as judged_version
                from rule_of_hour r join reaches using (rule_set)
                    left join (select hour, max(version) as version from accepted group by hour) n
                        on n.hour between r.hour - reaches.hours and r.hour
                group by r.hour, r.rule_set, r.events_version
            ) group by all
            """
        )

    def _judge_round(self, rules: _RuleSet, name: str, version: int | None, hours: list[int], number: int) -> None:
        wide = {at for hour in hours for at in range(hour - rules.look_back_hours, hour + 1)}
        self._recount.keep("round_hours", pa.table({"hour": pa.array(sorted(hours), pa.int64())}))
        self._recount.keep("round_wide", pa.table({"hour": pa.array(sorted(wide), pa.int64())}))
        seen = "true" if version is None else f"version <= {version}"
        self._lake.execute(
            f"""
            create or replace temp table round as
            select o, line, record_id, event_type, time_us, user_id, ad_id, impression_id, user_agent, hour,
                hour in (from round_hours) as is_asked
            from accepted where hour in (from round_wide) and {seen}
            """
        )
        self._record_rules(rules, name, "(from round where is_asked)")
        users = [user for (user,) in self._recount.rows("select distinct user_id from round")]
        self._recount.keep("exempt_values", pa.table({"value": pa.array(rules.exempt_among(users), pa.string())}))
        self._lake.execute("create or replace temp view known as from round where user_id not in (from exempt_values)")
        for kind in ("click", "impression"):
            if f"repeat_{kind}" in rules.on:
                frame = f"range between {rules.window_us(f'repeat_{kind}') - 1} preceding and 1 preceding"
                self._hit(
                    name,
                    f"repeat_{kind}",
                    f"""
                    select *, count(*) over (partition by user_id, ad_id order by time_us {frame}) as near,
                        row_number() over (partition by user_id, ad_id, time_us order by record_id) as nth
                    from known where event_type = '{kind}' qualify is_asked and (near > 0 or nth > 1)
                    """,
                )
        if "unmatched_click" in rules.on:
            self._hit(
                name,
                "unmatched_click",
                f"""
                select * from round c where is_asked and event_type = 'click' and not exists (
                    select 1 from round i where i.event_type = 'impression' and i.record_id = c.impression_id
                        and i.user_id = c.user_id and i.ad_id = c.ad_id and i.time_us <= c.time_us
                        and i.time_us >= c.time_us - {rules.window_us("unmatched_click")})
                """,
            )
        if "click_rate" in rules.on:
            self._hit(
                name,
                "click_rate",
                f"""
                select * from known where is_asked and event_type = 'click' and (user_id, hour) in (
                    select (user_id, hour) from known where event_type = 'click' group by user_id, hour
                    having count(*) > {int(rules.content["click_rate"]["clicks"])})
                """,
            )

    def _record_rules(self, rules: _RuleSet, name: str, source: str) -> None:
        for rule, column in (("crawler_user_agent", "user_agent"), ("listed_user", "user_id"), ("listed_network", "user_id")):
            if rule not in rules.on or not rules.content[{"user_agent": "crawler_patterns"}.get(column, f"{rule[7:]}s")]:
                continue
            values = [
                value for (value,) in self._recount.rows(f"select distinct {column} from {source} where {column} is not null")
            ]
            self._recount.keep("hit_values", pa.table({"value": pa.array(rules.hits_of(rule, values), pa.string())}))
            self._hit(name, rule, f"select * from {source} where {column} in (from hit_values)")

    def _hit(self, rule_set: str, rule: str, sql: str) -> None:
        self._lake.execute(f"insert into hits select o, line, '{rule_set}', '{rule}' from ({sql})")
