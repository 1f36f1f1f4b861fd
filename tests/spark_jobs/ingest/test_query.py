"""When a running query is stopped for another pace."""

from __future__ import annotations

from pathlib import Path

import pytest

from spark_jobs.config import load_settings
from spark_jobs.errors import StoppedError
from spark_jobs.ingest.orders import OrdersJob
from spark_jobs.ingest.pace import Pace
from spark_jobs.ingest.query import SourceQuery


class Stream:
    """A streaming query of which only the stop counts."""

    def __init__(self) -> None:
        self.stops = 0

    def stop(self) -> None:
        self.stops += 1


class Frame:
    """The frame of a batch, whose rows nobody reads."""

    sparkSession = None


@pytest.mark.parametrize(
    ("interval", "is_stopped"), [(0.4, True), (0.6, False), (1.0, False), (1.9, False), (2.1, True)], ids=lambda value: str(value)
)
def test_a_query_is_stopped_between_two_batches_if_its_looks_are_out_of_pace(
    tmp_path: Path, interval: float, is_stopped: bool
) -> None:
    settings, stream = load_settings(home=tmp_path), Stream()
    query = SourceQuery(OrdersJob(settings, lambda _: None), settings)
    assert not query.stop_if_out_of_pace(), "it has not started"
    query.pace, query._stream, query._polling_seconds = Pace(interval), stream, 1.0  # type: ignore[assignment]
    with query._running_batch:
        assert not query.stop_if_out_of_pace(), "a batch runs"
        assert not query.stopping.is_set()
    assert query.stop_if_out_of_pace() is is_stopped
    assert stream.stops == int(is_stopped)
    if is_stopped:
        with pytest.raises(StoppedError):
            query._run(Frame(), 0)  # type: ignore[arg-type]
