"""The prices and rules that new batches are decided with, and what is wrong with the files that they come from.

A file that breaks its contract while an ingest runs must not stop the streams: what its last right content said stays in force,
and `adtally status`, a health signal and a notice say so. An ingest that has nothing in force yet does not start.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from spark_jobs.attribution.rules import load_attribution_rules
from spark_jobs.config import Settings
from spark_jobs.errors import CampaignFileError, RuleFileError
from spark_jobs.ingest.campaigns import load_campaigns, prices_in_force, read_campaigns
from spark_jobs.rules.store import keep_rule_set
from spark_jobs.traffic.rules import KIND, InvalidTrafficRules, current_rules

Notice = Callable[[str], None]


class InForce:
    """Prices and rules of invalid traffic for new batches. All streams of one process share it.

    ``notice`` gets one line when a file turns bad, and one when it is right again.
    """

    def __init__(self, settings: Settings, notice: Notice | None = None) -> None:
        self._settings = settings
        self._notice = notice or (lambda _line: None)
        self._problems: dict[str, str] = {}
        self._rules: InvalidTrafficRules | None = None
        self._kept: tuple[str, InvalidTrafficRules] | None = None

    def prices(self) -> int:
        """Bring table `campaigns` up to its files; returns its version. A bad file leaves the prices in force.

        Raises CampaignFileError where there are none.
        """
        try:
            version = load_campaigns(self._settings)
        except CampaignFileError as error:
            version = prices_in_force(self._settings)
            if version is None:
                raise
            self._say("campaign files", f"{error}; the prices in force stay")
        else:
            self._say("campaign files", "")
        return version or 0

    def rules(self) -> InvalidTrafficRules:
        """The rules of invalid traffic as the files say them. A bad file leaves those that this process read last.

        Raises RuleFileError where it read none yet.
        """
        try:
            self._rules = current_rules(self._settings)
        except RuleFileError as error:
            if self._rules is None:
                raise
            self._say("rules of invalid traffic", f"{error}; the rules in force stay")
        else:
            self._say("rules of invalid traffic", "")
        return self._rules

    def rule_set(self) -> tuple[str, InvalidTrafficRules]:
        """``rules``, and the hash under which `rule_sets` then holds them."""
        rules = self.rules()
        if self._kept is None or self._kept[1] != rules:
            self._kept = (keep_rule_set(self._settings, KIND, rules, datetime.now(UTC)), rules)
        return self._kept

    def _say(self, what: str, problem: str) -> None:
        before = self._problems.get(what, "")
        self._problems[what] = problem
        if problem != before:
            self._notice(problem or f"{what}: all is right again")


def campaign_file_problems(settings: Settings) -> list[str]:
    """One line if the campaign files cannot be read as they are, and what holds meanwhile."""
    try:
        read_campaigns(settings.landing_path)
    except CampaignFileError as error:
        held = "there are no prices in force" if prices_in_force(settings) is None else "the prices in force stay"
        return [f"{error}; {held}"]
    return []


def rule_file_problems(settings: Settings) -> list[str]:
    """One line for each rule file that cannot be right."""
    problems = []
    for load in (current_rules, load_attribution_rules):
        try:
            load(settings)
        except RuleFileError as error:
            problems.append(str(error))
    return problems
