"""Replaces `adtally marts build --continuous --json` in a test: prints a build for each new version of the ledger."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

LOG = Path(os.environ["ADTALLY_HOME"]) / "lakehouse" / "batch_ledger" / "_delta_log"


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    version = 0
    while True:
        if (LOG / f"{version:020d}.json").exists():
            print(json.dumps({"versions": {"batch_ledger": version}, "seconds": 0.1, "days": 1}), flush=True)
            version += 1
        else:
            time.sleep(0.1)


if __name__ == "__main__":
    raise SystemExit(main())
