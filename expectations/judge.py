"""Great Expectations judges what was measured: a suite of real expectations over the one row of measures.

The measures come from one scan (docs/decisions/0006), so an expectation is over a measure: a column of a frame with one row. Which
column of the table it is about stands in its name and description, and the data docs show both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from great_expectations.compatibility.pydantic import PrivateAttr
from great_expectations.core import ExpectationSuiteValidationResult
from great_expectations.data_context.types.base import ProgressBarsConfig
from great_expectations.expectations.core.expect_column_max_to_be_between import ExpectColumnMaxToBeBetween
from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
from great_expectations.expectations.metadata_types import FailureSeverity

from expectations._gx import gx
from expectations.checks import Check, Kind, Severity

if TYPE_CHECKING:
    from great_expectations.core.batch_definition import BatchDefinition
    from great_expectations.data_context.data_context.ephemeral_data_context import EphemeralDataContext

_SEVERITY = {Severity.ERROR: FailureSeverity.CRITICAL, Severity.WARN: FailureSeverity.WARNING}


class ExpectMeasure(ExpectColumnMaxToBeBetween):
    """A measure stays at or below a limit."""

    _made: ExpectationConfiguration | None = PrivateAttr(None)

    @property
    def configuration(self) -> ExpectationConfiguration:
        """Made once: a validation asks for it two dozen times, which is half of what the validation takes."""
        if self._made is None:
            self._made = super().configuration
        return self._made


class ExpectNoOffenders(ExpectMeasure):
    """No row breaks the rule: the measure is the number of those that do."""


class ExpectMeasureAtMost(ExpectMeasure):
    """A measure that is no count of offenders stays at or below a limit: a share, an index, a score."""


class Judge:
    """An ephemeral context, made once a process: making it and its data source costs more than a validation."""

    _shared: Judge | None = None

    def __init__(self) -> None:
        self._context: EphemeralDataContext = gx.get_context(mode="ephemeral")
        self._context.variables.progress_bars = ProgressBarsConfig(globally=False)
        assets = self._context.data_sources.add_pandas("profiles")
        self._assets = assets
        self._batches: dict[str, BatchDefinition[Any]] = {}

    @classmethod
    def shared(cls) -> Judge:
        """This process's."""
        if cls._shared is None:
            cls._shared = cls()
        return cls._shared

    def judge(self, table: str, checks: Sequence[Check], measures: dict[str, float]) -> ExpectationSuiteValidationResult:
        """Validate a row of measures by the expectations of ``checks``, each of which has one."""
        if table not in self._batches:
            self._batches[table] = self._assets.add_dataframe_asset(table).add_batch_definition_whole_dataframe("hour")
        # whole numbers as such, and of Python's types: the data docs print what they get
        row = {check.name: int(value) if (value := measures[check.name]).is_integer() else value for check in checks}
        frame = pd.DataFrame([row], dtype=object)
        suite = gx.ExpectationSuite(name=table, expectations=[_expectation(check) for check in checks])
        batch = self._batches[table].get_batch({"dataframe": frame})
        return batch.validate(suite, result_format="BASIC")


def successes(result: ExpectationSuiteValidationResult) -> dict[str, bool]:
    """Check -> whether it is met."""
    configured = ((each.expectation_config, each.success) for each in result.results)
    return {config.kwargs["column"]: bool(success) for config, success in configured if config is not None}


def expectation_type(check: Check) -> str:
    """The name by which Great Expectations knows the expectation of a check."""
    return str(_class(check).expectation_type)


def _class(check: Check) -> type[ExpectMeasure]:
    return ExpectMeasureAtMost if check.at_most or check.kind is Kind.BASELINE else ExpectNoOffenders


def _expectation(check: Check) -> ExpectMeasure:
    return _class(check)(column=check.name, max_value=check.at_most, severity=_SEVERITY[check.severity], description=check.expected)
