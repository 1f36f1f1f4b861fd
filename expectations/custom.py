"""Expectations that Great Expectations does not have."""

from __future__ import annotations

from typing import Any, ClassVar

from great_expectations.core.suite_parameters import SuiteParameterDict
from great_expectations.expectations.expectation import BatchExpectation

from expectations._gx import gxe
from expectations.trailing import MAX_ROBUST_Z, MAX_STABILITY_INDEX, MIN_ROWS, Shares, keep_largest, robust_z, stability_index


class ExpectNoRows(gxe.UnexpectedRowsExpectation):
    """Expect a query to return no rows. Unlike its base class it runs the query only once, to count."""

    metric_dependencies: ClassVar[tuple[str, ...]] = ("unexpected_rows_query.row_count",)

    def _validate(self, metrics: dict[str, Any], runtime_configuration: Any = None, execution_engine: Any = None) -> Any:
        return super()._validate(metrics | {"unexpected_rows_query.table": []}, runtime_configuration, execution_engine)


class AgainstTheWeek(BatchExpectation):
    """Compares the result of a query with ``before``. If too little is known before, it is met without an observed value."""

    query: str
    fetch_all: bool = True

    metric_dependencies: ClassVar[tuple[str, ...]] = ("query.table",)
    success_keys: ClassVar[tuple[str, ...]] = ("query", "fetch_all", "before")


class ExpectSharesToBeStable(AgainstTheWeek):
    """Expect the shares of a column's values to be those of the trailing week, by the population stability index.

    ``query`` returns (value, weight). ``before``: value -> weight of the week, or None.
    """

    before: Shares | SuiteParameterDict | None = None  # type: ignore[type-arg]
    max_index: float = MAX_STABILITY_INDEX

    def _validate(self, metrics: dict[str, Any], runtime_configuration: Any = None, execution_engine: Any = None) -> dict[str, Any]:
        now = keep_largest({str(row["value"]): float(row["weight"] or 0) for row in metrics["query.table"]})
        before = self._get_success_kwargs()["before"]
        index = None
        if before and min(sum(before.values()), sum(now.values())) >= MIN_ROWS:
            index = stability_index(before, now)
        return _outcome(index, self.max_index, now)


class ExpectVolumeToBeUsual(AgainstTheWeek):
    """Expect a volume to be usual among the volumes of the same hour of the days before, by a robust z-score.

    ``query`` returns one number. ``before``: the volumes of the days, or None.
    """

    before: list[float] | SuiteParameterDict | None = None  # type: ignore[type-arg]
    max_score: float = MAX_ROBUST_Z

    def _validate(self, metrics: dict[str, Any], runtime_configuration: Any = None, execution_engine: Any = None) -> dict[str, Any]:
        (row,) = metrics["query.table"]
        (now,) = (float(value or 0) for value in row.values())
        before = self._get_success_kwargs()["before"]
        score = None if before is None else robust_z(before, now)
        return _outcome(score, self.max_score, now)


def _outcome(observed: float | None, highest: float, measured: Shares | float) -> dict[str, Any]:
    is_met = observed is None or observed <= highest
    return {"success": is_met, "result": {"observed_value": observed, "details": {"measured": measured}}}
