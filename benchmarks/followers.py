"""Notice when what was sent can be read: in the Delta tables, and in the published marts.

Every group of events (a landing file, or what is sent to a topic at a time) has its own `placement`. Placement is a dimension of
the increments, so a group is readable at the moment when the increments read with its placement add up to its events; nothing else
has to be trusted for that. It is in the marts when a build is published that read a version of the ledger with the batch that
completed the group: a batch is in a build wholly or not at all.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from benchmarks import delta_log
from benchmarks.measure import TreeSampler, end_tree, note

POLL_SECONDS = 0.1
COUNTS = ["impressions", "clicks", "invalid_impressions", "invalid_clicks"]
_PATIENCE_SECONDS = 300.0


def marts_command() -> list[str]:
    """Return the command by which `adtally up` builds the marts, with a JSON line a build."""
    return [sys.executable, "-m", "orchestration.cli", "marts", "build", "--continuous", "--json"]


class IncrementReader(threading.Thread):
    """Follows `minute_metrics` and `batch_ledger`, and reads the data files that each version adds, every tenth of a second.

    ``readable_at`` says when all ``size`` events of a group had been read, `ledger_version` which version of the ledger has the
    batch with the last of them.
    """

    def __init__(self, lakehouse: Path, size: int) -> None:
        super().__init__(daemon=True)
        self.readable_at: dict[str, float] = {}
        self.failure: Exception | None = None
        self._metrics, self._ledger, self._size = lakehouse / "minute_metrics", lakehouse / "batch_ledger", size
        self._next = {self._metrics: 0, self._ledger: 0}
        self._read: Counter[str] = Counter()
        self._batch_of: dict[str, tuple[str, int]] = {}
        self._ledger_of: dict[tuple[str, int], int] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            while not self._ended.wait(POLL_SECONDS):
                while self._take(self._metrics) or self._take(self._ledger):
                    pass
        except Exception as error:
            self.failure = error

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def ledger_version(self, group: str) -> int | None:
        """None: the batch that completed the group is not in the ledger yet."""
        return self._ledger_of.get(self._batch_of.get(group, ("", -1)))

    def _take(self, table: Path) -> bool:
        version = self._next[table]
        if not delta_log.version_file(table, version).exists():
            return False
        try:
            found = list(delta_log.actions(delta_log.version_file(table, version)))
        except ValueError:
            return False  # the entry is just being written
        self._next[table] += 1
        txn = next((action["txn"] for action in found if "txn" in action), None)
        batch = (str(txn["appId"]), int(str(txn["version"]))) if txn else None
        if table == self._ledger:
            if batch:
                self._ledger_of[batch] = version
            return True
        files = delta_log.added_files(table, version)
        if files:
            rows = delta_log.read_columns(files, ["placement", *COUNTS]).to_pydict()
            for placement, *counts in zip(rows["placement"], *(rows[name] for name in COUNTS), strict=True):
                self._read[placement] += sum(count or 0 for count in counts)
            now = time.monotonic()
            for placement in set(rows["placement"]):
                if self._read[placement] >= self._size:
                    self.readable_at.setdefault(placement, now)
                    if batch:
                        self._batch_of.setdefault(placement, batch)
        return True


class MartFollower(threading.Thread):
    """Runs the builds of the marts as `adtally up` does, and keeps when each was published.

    ``builds``: what each build printed, with ``published_at`` (monotonic seconds). ``sampler``: its processes.
    """

    def __init__(self, env: dict[str, str], log: Path) -> None:
        super().__init__(daemon=True)
        self.builds: list[dict[str, float]] = []
        self._log = log.open("w")
        self.process = subprocess.Popen(
            marts_command(), env=env, stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True
        )
        self.sampler = TreeSampler(self.process.pid)

    def run(self) -> None:
        assert self.process.stdout is not None
        self.sampler.start()
        for line in self.process.stdout:
            if line.startswith("{"):
                built = json.loads(line)
                figures = {"ledger_version": built["versions"]["batch_ledger"], "seconds": built["seconds"], "days": built["days"]}
                self.builds.append(figures | {"published_at": time.monotonic()})

    def published_at(self, ledger_version: int | None) -> float | None:
        """When the first build was published that read at least this version."""
        if ledger_version is None:
            return None
        return next((b["published_at"] for b in list(self.builds) if b["ledger_version"] >= ledger_version), None)

    def stop(self) -> None:
        self.sampler.stop()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            note("freshness: a build of the marts did not end")
        end_tree(self.process)
        self.join(5)
        self._log.close()
