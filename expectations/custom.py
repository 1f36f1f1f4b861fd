"""Expectations that Great Expectations does not have."""

from __future__ import annotations

from typing import Any, ClassVar

from great_expectations.core.suite_parameters import SuiteParameterDict
from great_expectations.expectations.expectation import BatchExpectation

from expectations._gx import gxe
from expectations.trailing import MAX_ROBUST_Z, MAX_STABILITY_INDEX, MIN_ROWS, Shares, keep_largest, robust_z, stability_index


class ExpectNoRows(gxe.UnexpectedRowsExpectation):
    """Expect a query to return no rows: UnexpectedRowsExpectation, but it runs the query once, to count, and not twice."""

    metric_dependencies: ClassVar[tuple[str, ...]] = ("unexpected_rows_query.row_count",)

    def _validate(self, metrics: dict[str, Any], runtime_configuration: Any = None, execution_engine: Any = None) -> Any:
        return super()._validate(metrics | {"unexpected_rows_query.table": []}, runtime_configuration, execution_engine)


class AgainstTheWeek(BatchExpectation):
    """Measures by a query and compares with ``before``. It is met, with no observed value, where too little is known of before."""

    query: str
    fetch_all: bool = True

    metric_dependencies: ClassVar[tuple[str, ...]] = ("query.table",)
    success_keys: ClassVar[tuple[str, ...]] = ("query", "fetch_all", "before")


class ExpectSharesToBeStable(AgainstTheWeek):
    """Expect the shares of the values of a column to be those of the trailing week, by the population stability index.

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
        return {
            "success": index is None or index <= self.max_index,
            "result": {"observed_value": index, "details": {"measured": now}},
        }


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
        return {
            "success": score is None or score <= self.max_score,
            "result": {"observed_value": score, "details": {"measured": now}},
        }
