"""The project's ingest without the raw copy of what it consumes, to see what that copy costs: ``… ingest --json``. Not for use."""

from __future__ import annotations

import sys
from typing import Any

from spark_jobs.__main__ import main
from spark_jobs.ingest import runner as ingest

_all_queries: Any = ingest._queries


def _without_raw(*args: Any, **options: Any) -> list[Any]:
    return [query for query in _all_queries(*args, **options) if not query.name.startswith("raw_")]


if __name__ == "__main__":
    ingest._queries = _without_raw
    sys.exit(main())
