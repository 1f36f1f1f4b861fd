"""Python code in a process of its own that is meant to be killed: a fork of one that has imported what takes long."""

from __future__ import annotations

import multiprocessing
import os
from functools import cache
from multiprocessing.context import ForkServerContext

_PRELOADED = [
    "spark_jobs.corrections.backfill",
    "spark_jobs.operate.compact",
    "spark_jobs.traffic.review",
    "spark_jobs.operate.settle",
]


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def run_code(code: str, **environment: str) -> int:
    """Run ``code`` with these variables added; its exit status, negative where a signal ended it."""
    process = _server().Process(target=_run, args=(code, {**os.environ, **environment}))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(code: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    exec(compile(code, "<killed>", "exec"), {"__name__": "__killed__"})
