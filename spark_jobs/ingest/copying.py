"""Copy to a remote lakehouse, beside the batches, what none of them waits for: which batches have ended, and the key index.

A machine may be lost before its last copy. The next one then runs the last batch again, which changes nothing, and reads the keys
of the commits that the copied index does not cover.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from spark_jobs.background import in_background
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError
from spark_jobs.ingest.dedupe.index import KeyCodec, KeyIndex
from spark_jobs.ingest.dedupe.shards import ShardedIndex
from spark_jobs.ingest.query import SourceQuery
from spark_jobs.lake.places import state_copies
from spark_jobs.lake.runs_copy import RunsCopy
from spark_jobs.session import is_one_machine

_BATCHES_SECONDS = 1.0
_INDEX_SECONDS = 30.0
_LAST_SECONDS = 15.0  # for the last copies, when the ingest ends


Index = KeyIndex | ShardedIndex


def open_key_index(settings: Settings, master: str) -> tuple[Index, Callable[[], None] | None]:
    """Open the key index: in the home or, for executors of a cluster that share a store with the driver, in the store.

    The one in the home is fetched if another machine has copied a newer one. Returns also what copies it (None: a local lakehouse).
    """
    place = state_copies(settings, settings.key_index_path.name)
    if place is None:
        return KeyIndex(settings.key_index_path), None
    if not is_one_machine(master):
        shutil.rmtree(settings.key_index_path, ignore_errors=True)  # nothing brings it up to date
        return ShardedIndex(place), lambda: None
    copy = RunsCopy(place, settings.key_index_path, KeyCodec.shape)
    copy.fetch()
    return KeyIndex(settings.key_index_path), copy.update


@contextmanager
def copying(
    copy_index: Callable[[], None] | None, queries: Callable[[], Sequence[SourceQuery]], notice: Callable[[str], None]
) -> Iterator[None]:
    """Copy during the block, and once more at its end. Does nothing if ``copy_index`` is None: the lakehouse is local.

    A problem goes to ``notice`` once and stops no batch.
    """
    if copy_index is None:
        yield
        return
    problems: set[str] = set()

    def attempt(copy: Callable[[], None]) -> None:
        try:
            copy()
        except (AdtallyError, OSError) as error:
            if str(error) not in problems:
                problems.add(str(error))
                notice(f"copying to the lakehouse waits: {error}")

    def run(stop: threading.Event) -> None:
        index_at, is_last = time.monotonic(), False
        while not is_last:
            is_last = stop.wait(_BATCHES_SECONDS)
            for query in queries():
                attempt(query.copy_ended)
            if is_last or time.monotonic() >= index_at:
                attempt(copy_index)
                index_at = time.monotonic() + _INDEX_SECONDS

    with in_background("copying", run, wait_seconds=lambda: _LAST_SECONDS):
        yield
