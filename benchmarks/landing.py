"""Listing a landing folder in an object store: requests and seconds, by listing after the largest key and by listing all.

``python -m benchmarks.landing`` needs a store (`adtally services s3 up`) and its variables (AWS_ENDPOINT_URL and so on).
"""

from __future__ import annotations

import argparse
import json
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from spark_jobs.config import Settings, load_settings
from spark_jobs.lake.landing_view import refresh_landing
from spark_jobs.lake.places import PlacedFile, StorePlace, open_place

_PAGE = 1_000  # keys that S3 lists in a request
_ROUNDS = 5


class Requests:
    """Counts the listing requests of this process."""

    def __init__(self) -> None:
        self.count = 0
        listed, of_folder = StorePlace.list, StorePlace.list_folder

        def counting(place: StorePlace, folder: str = "", *, after: str | None = None) -> Iterator[PlacedFile]:
            found = 0
            for one in listed(place, folder, after=after):
                found += 1
                yield one
            self.count += max(1, -(-found // _PAGE))

        def counting_folder(place: StorePlace, folder: str) -> Any:
            self.count += 1
            return of_folder(place, folder)

        StorePlace.list = counting  # type: ignore[method-assign]
        StorePlace.list_folder = counting_folder  # type: ignore[method-assign]


def measure(settings: Settings, requests: Requests, objects: int) -> list[dict[str, Any]]:
    """Return a row a way of listing a folder with so many objects. ``new`` is the number of objects since the last listing."""
    place = open_place(settings.landing_uri)
    body = b'{"event_id":"e"}\n' * 20

    def put(first: int, count: int) -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda number: place.write(f"events/eu-west/{number:08d}.jsonl", body), range(first, first + count)))

    put(0, objects)
    rows = [_timed(settings, requests, objects, "first", objects, is_full=True)]
    for way, is_full in (("after the largest key", False), ("all", True)):
        for new in (0, 10):
            rounds = []
            for _ in range(_ROUNDS):
                put(objects, new)
                objects += new
                rounds.append(_timed(settings, requests, objects, way, new, is_full=is_full))
            rows.append(rounds[0] | {"seconds": round(median(one["seconds"] for one in rounds), 4)})
    return rows


def _timed(settings: Settings, requests: Requests, objects: int, way: str, new: int, *, is_full: bool) -> dict[str, Any]:
    before, started = requests.count, time.perf_counter()
    refresh_landing(settings, is_full=is_full)
    seconds = round(time.perf_counter() - started, 4)
    return {"objects": objects, "listing": way, "new": new, "requests": requests.count - before, "seconds": seconds}


def main() -> None:
    """Print the rows as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bucket", default="s3://lake", help="where the objects are put, below a new name, and deleted again")
    parser.add_argument("--objects", type=int, nargs="+", default=[5_000, 20_000])
    args = parser.parse_args()
    requests = Requests()
    for objects in args.objects:
        with TemporaryDirectory() as home:
            settings = load_settings(home=Path(home), landing=f"{args.bucket}/{uuid.uuid4().hex}", landing_sweep="P1D")
            try:
                for row in measure(settings, requests, objects):
                    print(json.dumps(row), flush=True)
            finally:
                open_place(settings.landing_uri).delete_folder("")


if __name__ == "__main__":
    main()
