"""Translates errors into failures of a step, and what a check found in each hour into Dagster's events."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import dagster as dg

from orchestration.partitions import key_of
from spark_jobs.actor import Actor, acting_as
from spark_jobs.errors import AdtallyError


@contextmanager
def translate_errors(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext) -> Iterator[None]:
    """Turn an AdtallyError into a failure of the step, which Dagster retries only if that can help.

    The audit log names the run and its asset or check as who acts.
    """
    step = context.op_execution_context
    try:
        with acting_as(Actor.of_process(f"dagster {step.op.name}", step.run_id)):
            yield
    except AdtallyError as error:
        raise dg.Failure(description=str(error), allow_retries=error.retryable) from error


@dataclass(frozen=True)
class Verdict:
    """What a check found in one hour. If ``is_error`` is false, a failure does not stop the later steps."""

    hour: datetime
    passed: bool
    is_error: bool = True
    description: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def evaluations(check: dg.AssetCheckSpec, verdicts: Iterable[Verdict]) -> Iterator[dg.AssetCheckEvaluation | dg.Output[None]]:
    """Yield one evaluation for each verdict's partition, and the output by which Dagster knows that the check has run.

    An AssetCheckResult would count for the whole run, which can have many hours.
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
