"""Choose the prices and rules that new batches are decided with, and report bad campaign and rule files.

A file that breaks its contract during an ingest must not stop the streams: its last good content stays in force, and `adtally
status`, a health signal and a notice report the file. An ingest that has nothing in force yet does not start.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from spark_jobs.attribution.rules import load_attribution_rules
from spark_jobs.config import Settings
from spark_jobs.errors import CampaignFileError, RuleFileError
from spark_jobs.ingest.campaigns import campaign_contents, load_campaigns, prices_in_force, read_campaigns
from spark_jobs.lake.log import DeltaLog
from spark_jobs.lake.tables import CAMPAIGNS
from spark_jobs.rules.store import keep_rule_set
from spark_jobs.traffic.rules import KIND, InvalidTrafficRules, current_rules


class InForce:
    """Prices and rules for all new batches of a process. ``notice`` gets a line when a file turns bad, or is right again."""

    def __init__(self, settings: Settings, notice: Callable[[str], None] = lambda _line: None) -> None:
        self._settings = settings
        self._notice = notice
        self._problems: dict[str, str] = {}
        self._loaded: tuple[str | None, int | None] | None = None  # what the campaign files had, and the version that has it
        self._rules: InvalidTrafficRules | None = None
        self._kept: tuple[str, InvalidTrafficRules] | None = None

    def prices(self) -> int:
        """Load the campaign files; return the version of `campaigns`. Raises CampaignFileError if they are bad and it is empty."""
        newest = DeltaLog(self._settings.table_uri(CAMPAIGNS.name)).latest_version()
        contents = campaign_contents(self._settings.landing_path)
        if contents is not None and self._loaded == (contents, newest):  # to parse them again takes longer than any other file
            return newest or 0
        problem, self._loaded = "", None
        try:
            version = load_campaigns(self._settings)
            self._loaded = (contents, version)
        except CampaignFileError as error:
            version = prices_in_force(self._settings)
            if version is None:
                raise
            problem = f"{error}; the prices in force stay"
        self._report("campaign files", problem)
        return version or 0

    def rules(self) -> InvalidTrafficRules:
        """Return the rules in the files or, if these are bad, the last good ones. Raises RuleFileError if there are none."""
        problem = ""
        try:
            self._rules = current_rules(self._settings)
        except RuleFileError as error:
            if self._rules is None:
                raise
            problem = f"{error}; the rules in force stay"
        self._report("rules of invalid traffic", problem)
        return self._rules

    def rule_set(self) -> str:
        """Return the hash of ``rules``, which is their key in table `rule_sets`. Adds them to the table if they are new."""
        rules = self.rules()
        if self._kept is None or self._kept[1] != rules:
            self._kept = (keep_rule_set(self._settings, KIND, rules, datetime.now(UTC)), rules)
        return self._kept[0]

    def _report(self, files: str, problem: str) -> None:
        if problem != self._problems.get(files, ""):
            self._notice(problem or f"{files}: all is right again")
        self._problems[files] = problem


def campaign_file_problems(settings: Settings) -> list[str]:
    """Return a line if the campaign files are bad, with the prices that apply meanwhile."""
    try:
        read_campaigns(settings.landing_path)
    except CampaignFileError as error:
        effect = "there are no prices in force" if prices_in_force(settings) is None else "the prices in force stay"
        return [f"{error}; {effect}"]
    return []


def rule_file_problems(settings: Settings) -> list[str]:
    """Return a line for each bad rule file."""
    problems = []
    for load in (current_rules, load_attribution_rules):
        try:
            load(settings)
        except RuleFileError as error:
            problems.append(str(error))
    return problems
