"""How an asset's body ends: a clear line where it cannot do its work, and what a check found in each hour."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import dagster as dg

from orchestration.partitions import key_of
from spark_jobs.errors import AdtallyError


@contextmanager
def failing_clearly() -> Iterator[None]:
    """Turn an AdtallyError into a failure of the step, which is tried again only where that can help."""
    try:
        yield
    except AdtallyError as error:
        raise dg.Failure(description=str(error), allow_retries=error.retryable) from error


@dataclass(frozen=True)
class Verdict:
    """What a check found in one hour. ``is_error`` False: it fails without holding up what comes after it."""

    hour: datetime
    passed: bool
    is_error: bool = True
    description: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def evaluations(check: dg.AssetCheckSpec, verdicts: Iterable[Verdict]) -> Iterator[dg.AssetCheckEvaluation | dg.Output[None]]:
    """The verdicts as evaluations, one a partition, and the output that tells Dagster that the check has run.

    An AssetCheckResult would stand for the run: of a run that takes a range, Dagster would not know which hours it is of.
    """
    for verdict in verdicts:
        yield dg.AssetCheckEvaluation(
            asset_key=check.asset_key,
            check_name=check.name,
            passed=verdict.passed,
            metadata=verdict.metadata,
            severity=dg.AssetCheckSeverity.ERROR if verdict.is_error else dg.AssetCheckSeverity.WARN,
            description=verdict.description,
            blocking=check.blocking,
            partition=key_of(verdict.hour),
        )
    yield dg.Output(None, output_name=check.get_python_identifier())
