"""Runs the ingest on a cluster: ``python -m spark_jobs ingest`` (or spark-submit with this file), set up by ADTALLY_* variables."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

if not __package__:  # spark-submit runs this as a file: then Python searches this folder, not its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from spark_jobs.no_pandas import hide_pandas

if __name__ == "__main__":
    hide_pandas()  # before the imports that follow load it

from spark_jobs.config import load_settings
from spark_jobs.errors import AdtallyError
from spark_jobs.failure import MESSAGE_LENGTH, failure_cause, one_line
from spark_jobs.ingest.batch import BatchReport
from spark_jobs.ingest.runner import run_ingest
from spark_jobs.private import keep_files_private


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m spark_jobs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ingest = commands.add_parser("ingest", help="events and orders from landing folders and Kafka into the lakehouse")
    ingest.add_argument("--continuous", action="store_true", help="until SIGTERM instead of all that is there")
    ingest.add_argument("--trigger", type=float, metavar="SECONDS", help="time between two small batches")
    ingest.add_argument("--json", action="store_true", help="one JSON line a batch on standard output")
    ingest.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    options = parser.parse_args(arguments)
    keep_files_private()

    def progress(batch: BatchReport) -> None:
        line = json.dumps(asdict(batch)) if options.json else f"{batch.stream} batch {batch.batch_id}: {batch.accepted} accepted"
        print(line, flush=True)

    try:
        run_ingest(
            load_settings(),
            continuous=options.continuous,
            trigger_seconds=options.trigger,
            progress=progress,
            notice=lambda line: print(f"adtally: {line}", file=sys.stderr, flush=True),
        )
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        cause = failure_cause(error)
        hint = f" ({cause.hint})" if cause.hint else ""
        text = str(error) if isinstance(error, AdtallyError) else f"{cause}{hint}"
        print(f"adtally: error: {one_line(text, MESSAGE_LENGTH)}", file=sys.stderr)
        return error.exit_code if isinstance(error, AdtallyError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
