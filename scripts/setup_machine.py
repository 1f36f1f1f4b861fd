"""What a checkout needs beside its Python packages: Java, the jars, DuckDB's delta extension. Quick when all is there."""

from __future__ import annotations

import sys

from spark_jobs.class_archive import make_class_archive
from spark_jobs.config import load_settings
from spark_jobs.errors import AdtallyError
from spark_jobs.java import require_java
from spark_jobs.lake.duck import connect_delta


def main() -> int:
    """Set up; the exit status of the process."""
    try:
        require_java()
        make_class_archive(load_settings(), progress=lambda line: print(f"adtally: {line}", flush=True))
        connect_delta().close()
    except AdtallyError as error:
        print(f"adtally: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
