"""Builds the near-real-time marts again and again, as the schedule of an installation would at its shortest, until SIGTERM.

A JSON line a build: ``ledger_version`` that it read, ``published_at`` (monotonic seconds) and how many ``seconds`` it took.
"""

from __future__ import annotations

import json
import signal
import sys
import time

from orchestration.marts import build_marts
from spark_jobs.config import load_settings
from spark_jobs.errors import AdtallyError


def main() -> int:
    settings = load_settings()
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    while not ended:
        try:
            built = build_marts(settings, "near_real_time")
        except AdtallyError as error:  # there are no tables yet
            print(error, file=sys.stderr, flush=True)
            time.sleep(1)
            continue
        line = {"ledger_version": built.versions["batch_ledger"], "published_at": time.monotonic(), "seconds": built.seconds}
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
