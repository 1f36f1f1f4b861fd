"""Judge which accepted events are invalid traffic, by code that shares nothing with the ingest and the review.

- A reviewed hour is judged by all rules of its last review's rule set, over the batches that the review has seen.
- Later batches, and hours that were never reviewed, are judged by the record rules of each batch's plan.
- An event is a repeat if another event of the same user, ad and type precedes it by less than the window. Of several events at the
  same moment, all but the first id are repeats.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any

import pyarrow as pa

from spark_jobs.audit.database import Database
from spark_jobs.audit.inputs import BatchState
from spark_jobs.errors import TableCorruptionError
from spark_jobs.lake.tables import RULE_SETS, TRAFFIC_REVIEWS
from spark_jobs.units import HOUR_US, SECOND_US

_LISTS = {"crawler_user_agent": "crawler_patterns", "listed_user": "users", "listed_network": "networks"}
"""The lists of the rules that need no other record. A rule with an empty list hits nothing."""
_WINDOWS = ("repeat_click", "repeat_impression", "unmatched_click")
_ORDER = (*_LISTS, *_WINDOWS, "click_rate")
_POSITION = f"list_position([{', '.join(map(repr, _ORDER))}], h.rule)"


class _RuleSet:
    """A rule set, from its content in the table `rule_sets`."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.on = {name for name in _ORDER if content[name]["mode"] != "off" and content.get(_LISTS.get(name, ""), True)}
        self.invalid = {name for name in _ORDER if content[name]["mode"] == "invalid"}
        self.windows_us = {name: int(content[name]["window_seconds"]) * SECOND_US for name in _WINDOWS}
        self._crawlers: dict[str, bool] = {}
        self._users = set(content["users"])
        self._exempt = {_folded(user) for user in content.get("exempt_users", ())}  # older rule sets have none
        self._networks = [ipaddress.ip_network(text) for text in content["networks"]]

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [re.compile(pattern) for pattern in self.content["crawler_patterns"]]

    @property
    def look_back_hours(self) -> int:
        """How many hours back the windows of an hour reach."""
        return max((-(-window // HOUR_US) for name, window in self.windows_us.items() if name in self.on), default=0)

    def is_crawler(self, agent: str) -> bool:
        """Return whether any pattern matches a user agent."""
        if agent not in self._crawlers:
            self._crawlers[agent] = any(pattern.search(agent) for pattern in self._patterns)
        return self._crawlers[agent]

    def is_listed(self, user: str) -> bool:
        """Return whether a user id is listed."""
        return user in self._users

    def is_in_network(self, user: str) -> bool:
        """Return whether a user id is an address in a listed network."""
        try:
            address = ipaddress.ip_address(user)
        except ValueError:
            return False
        return any(address in network for network in self._networks)

    def is_exempt(self, user: str) -> bool:
        """Return whether the rules of activity skip a user."""
        return _folded(user) in self._exempt


def _folded(user: str) -> str:
    """Return a user id without the blanks around it, its ASCII letters in lower case."""
    return "".join(letter.lower() if letter.isascii() else letter for letter in user.strip(" "))


class TrafficJudge:
    """Judges the accepted records of a recount in ``database``."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sets: dict[str, _RuleSet] = {}
        self._database.execute(
            f"""
            create temp table reviews as
            select hour_of(epoch_us(event_hour)) as hour, arg_max(rule_set, reviewed_at) as rule_set,
                arg_max(events_version, reviewed_at) as events_version
            from {database.scan(TRAFFIC_REVIEWS)} group by all
            """
        )
        self._reviewed: dict[int, str] = dict(database.rows("select hour, rule_set from reviews"))

    def _set(self, name: str) -> _RuleSet:
        if name not in self._sets:
            found = self._database.execute(
                f"select content from {self._database.scan(RULE_SETS)} where rule_set = ? limit 1", [name]
            ).fetchone()
            if found is None:
                raise TableCorruptionError(f"table rule_sets does not have the rule set {name}, by which events were judged")
            self._sets[name] = _RuleSet(json.loads(found[0]))
        return self._sets[name]

    def hours_to_count(self, hours: Collection[int]) -> set[int]:
        """Return ``hours`` and all hours that the rules of their reviews look back to: these must be counted as well."""
        found = set(hours)
        for hour in hours:
            if hour in self._reviewed:
                found.update(range(hour - self._set(self._reviewed[hour]).look_back_hours, hour))
        return found

    def judge(self, hours: Collection[int]) -> None:
        """Make the tables `marks` and `rule_of_hour` from the table `counted`.

        `marks` (o, line, rule, rules) has the accepted records of ``hours`` that a rule hits, `rule_of_hour` (hour, rule_set,
        events_version) the hours that were reviewed.
        """
        database = self._database
        database.keep_hours("asked", hours)
        database.execute(
            f"""
            create or replace temp table hits (o bigint, line bigint, rule_set varchar, rule varchar);
            create or replace temp view accepted as
            select counted.*, version, batches.rule_set as plan_rules from counted join batches using (b)
            where outcome = 'accepted' and state != '{BatchState.PENDING}';
            create or replace temp table rule_of_hour as select * from reviews where hour in (from asked)
            """
        )
        self._judge_by_plans()
        for rule_set, version, own in self._rounds():
            self._judge_round(self._set(rule_set), rule_set, version, own)
        used = self._database.values("select distinct rule_set from hits")
        invalid = [(name, rule) for name in used for rule in self._set(name).invalid]
        database.keep_rows("invalid_rules", invalid, rule_set=pa.string(), rule=pa.string())
        database.execute(
            f"""
            create or replace temp table marks as
            select o, line, arg_min(h.rule, {_POSITION}) filter (i.rule is not null) as rule,
                list(h.rule order by {_POSITION}) as rules
            from hits h left join invalid_rules i on i.rule_set = h.rule_set and i.rule = h.rule
            group by o, line
            """
        )

    def _judge_by_plans(self) -> None:
        """Judge records that no review has seen, by the record rules of their batches."""
        where = """
            hour in (from asked) and plan_rules is not null
            and not exists (from rule_of_hour r where r.hour = a.hour and a.version <= r.events_version)
        """
        self._database.execute(f"create or replace temp table unseen as select * from accepted a where {where}")
        for rule_set in self._database.values("select distinct plan_rules from unseen"):
            self._record_rules(self._set(rule_set), rule_set, f"(from unseen where plan_rules = '{rule_set}')")

    def _rounds(self) -> list[tuple[str, int | None, list[int]]]:
        """Return (rule set, version, hours) of hours judged together. The version is null if no later batch has records."""
        sets = self._database.values("select distinct rule_set from rule_of_hour")
        reaches = [(name, self._set(name).look_back_hours) for name in sets]
        self._database.keep_rows("reaches", reaches, rule_set=pa.string(), hours=pa.int64())
        return self._database.rows(
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

    def _judge_round(self, rules: _RuleSet, name: str, version: int | None, hours: list[int]) -> None:
        wide = {at for hour in hours for at in range(hour - rules.look_back_hours, hour + 1)}
        self._database.keep_hours("round_hours", hours)
        self._database.keep_hours("round_wide", wide)
        seen = "true" if version is None else f"version <= {version}"
        self._database.execute(
            f"""
            create or replace temp table round as
            select o, line, record_id, event_type, time_us, user_id, ad_id, impression_id, user_agent, hour,
                hour in (from round_hours) as is_asked
            from accepted where hour in (from round_wide) and {seen}
            """
        )
        self._record_rules(rules, name, "(from round where is_asked)")
        users = self._database.values("select distinct user_id from round")
        self._keep_values("exempt_values", filter(rules.is_exempt, users))
        self._database.execute("create or replace temp view known as from round where user_id not in (from exempt_values)")
        for kind in ("click", "impression"):
            if f"repeat_{kind}" in rules.on:
                frame = f"range between {rules.windows_us[f'repeat_{kind}'] - 1} preceding and 1 preceding"
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
                        and i.time_us >= c.time_us - {rules.windows_us["unmatched_click"]})
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
        for rule, column, is_hit in (
            ("crawler_user_agent", "user_agent", rules.is_crawler),
            ("listed_user", "user_id", rules.is_listed),
            ("listed_network", "user_id", rules.is_in_network),
        ):
            if rule in rules.on:
                values = self._database.values(f"select distinct {column} from {source} where {column} is not null")
                self._keep_values("hit_values", filter(is_hit, values))
                self._hit(name, rule, f"select * from {source} where {column} in (from hit_values)")

    def _keep_values(self, name: str, values: Iterable[str]) -> None:
        self._database.keep_rows(name, [(value,) for value in values], value=pa.string())

    def _hit(self, rule_set: str, rule: str, sql: str) -> None:
        self._database.execute(f"insert into hits select o, line, '{rule_set}', '{rule}' from ({sql})")
