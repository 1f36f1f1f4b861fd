"""Builds the near-real-time marts once and prints a JSON line: ``days``, the number of days that it made, or why it made all.

python -m benchmarks.mart_builds
python -m benchmarks.mart_builds --full               all marts, all days
"""

from __future__ import annotations

import argparse
import json
import sys

from orchestration.marts import build_marts
from spark_jobs.config import load_settings


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("--full", action="store_true", help="all days of all marts")
    args = options.parse_args()
    built = build_marts(load_settings(), "near_real_time", is_full=args.full)
    print(json.dumps({"days": built.days, "full_because": built.full_because}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
