"""Small files that are hard to take, made by a test. Run as a program: stages and writes each, and says what it needed.

``python bombs.py FOLDER [NAME ...]`` prints a JSON line a bomb: its name, the records offered, the rows written, the peak of the
process's memory in MiB, and the seconds.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

MIB = 1024 * 1024


def _line(number: int, **more: object) -> bytes:
    record = {
        "event_id": f"e{number}",
        "event_type": "click",
        "event_time": "2025-06-02T10:00:00Z",
        "received_at": "2025-06-02T10:00:02Z",
        **dict.fromkeys(("campaign_id", "ad_id", "store_id", "user_id"), "x"),
        "currency": "EUR",
        **more,
    }
    return json.dumps(record).encode() + b"\n"


def _hours() -> Iterator[bytes]:
    first = datetime(2001, 1, 1, tzinfo=UTC)
    for number in range(6_000):
        yield json.dumps({"event_time": (first + timedelta(hours=number)).isoformat()}).encode() + b"\n"


# name -> the content of its file, unpacked
BOMBS: dict[str, Callable[[], Iterator[bytes]]] = {
    "line feeds": lambda: (b"\n" * MIB for _ in range(16)),
    "empty objects": lambda: (b"{}\n" * 100_000 for _ in range(3)),
    "one line of 200 MiB": lambda: (b"a" * MIB for _ in range(200)),
    "lines of a megabyte": lambda: (b"a" * MIB + b"\n" for _ in range(150)),
    "nested arrays": lambda: (b"[" * 60_000 + b"\n" for _ in range(500)),
    "nested objects": lambda: (b'{"a":' * 13_000 + b"\n" for _ in range(500)),
    "an object of many members": lambda: (
        b"{" + b",".join(b'"%d":1' % (line * 10_000 + n) for n in range(5_000)) + b"}\n" for line in range(150)
    ),
    "a field of its own in each line": lambda: (_line(n, **{f"field-{n}": n}) for n in range(6_000)),
    "an hour of its own in each line": _hours,
    "one record over and over": lambda: (_line(1) * 10_000 for _ in range(10)),
}
TINY_MEMBERS = "tiny members"


def make(name: str, folder: Path) -> Path:
    """The file of a bomb."""
    path = folder / f"{name.replace(' ', '-')}.jsonl.gz"
    if name == TINY_MEMBERS:
        path.write_bytes(gzip.compress(b"\n", mtime=0) * 100_000)
        return path
    with gzip.open(path, "wb", compresslevel=6) as file:
        for part in BOMBS[name]():
            file.write(part)
    return path


def _peak_mib() -> int:
    status = Path("/proc/self/status").read_text("ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024


def main(folder: Path, names: list[str]) -> None:
    import numpy as np

    from spark_jobs.ingest.contract.spec import BatchLimits
    from spark_jobs.ingest.event_columns import CAMPAIGN_SCHEMA
    from spark_jobs.ingest.files.landing import Split
    from spark_jobs.ingest.reject_rows import share_rejects
    from spark_jobs.ingest.stage import StageTask, stage_split
    from spark_jobs.ingest.write import SplitRows, WriteJob, write_splits
    from spark_jobs.lake.stamp import Stamp
    from spark_jobs.lake.tables import REJECTED_EVENTS
    from spark_jobs.traffic.rules import no_rules

    now = 1_800_000_000_000_000
    limits = BatchLimits(now, 0, 300_000_000, 900_000_000, rejects_kept=1000)
    for number, name in enumerate(names):
        path = make(name, folder)
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak is counted from now on
        started = time.monotonic()
        # without limits of files: memory is bounded by itself, not by who gives up early
        task = StageTask(
            "events", Split(number, str(path), f"events/eu/{path.name}", "eu", 0, None), limits, str(folder / "scratch")
        )
        campaigns, rules = CAMPAIGN_SCHEMA.empty_table(), no_rules()
        staged = stage_split(task, campaigns, rules)
        (shares,) = share_rejects([task.split.name], [staged.rejects], limits.rejects_kept)
        nothing = np.empty(0, dtype=np.int64)
        work = SplitRows(task, 1, nothing, nothing, nothing.astype(np.uint64), nothing, shares)
        tables = (REJECTED_EVENTS, str(folder / "rejected"), str(folder / "events"))
        written = write_splits([work], WriteJob(True, Stamp("q", number, now), campaigns, rules, None, *tables))
        told = {
            "name": name,
            "stored": path.stat().st_size,
            "offered": staged.offered,
            "rejected": staged.rejects.total,
            "rows": sum(file.rows for file in written.rejects),
            "peak_mib": _peak_mib(),
            "seconds": round(time.monotonic() - started, 1),
        }
        print(json.dumps(told), flush=True)
        path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or [*BOMBS, TINY_MEMBERS])
