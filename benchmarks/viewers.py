"""Viewers of the console, all in one process: each holds a stream of events open and asks for a page every few seconds.

    python -m benchmarks.viewers http://127.0.0.1:PORT --viewers 50 --seconds 60

A JSON object on the last line: how long a page takes from the request to its last byte, how many events the streams brought, and
what went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections import Counter, defaultdict
from typing import Any
from urllib.parse import urlsplit

from benchmarks.measure import quantiles

PAGES = ("/", "/campaigns", "/trust", "/invalid-traffic", "/attribution", "/billing", "/operations")
VARIANTS = ("", "?region=eu", "?region=us")
"""Filters of the viewers, so that the console cannot answer all of them with the same bytes."""

_ANSWER_SECONDS = 30.0


class Viewers:
    """What all viewers see and measure."""

    def __init__(self, address: str, *, think: float, settle: float) -> None:
        parts = urlsplit(address)
        assert parts.hostname is not None and parts.port is not None
        self.host, self.port, self.think = parts.hostname, parts.port, think
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.first: list[float] = []
        self.settled_at = time.monotonic() + settle
        self.wrong: Counter[str] = Counter()
        self.events = self.streams = 0

    async def watch(self, number: int, until: float) -> None:
        """Be viewer ``number`` until a moment of the monotonic clock."""
        stream = asyncio.create_task(self._stream())
        await asyncio.sleep(self.think * (number % 50) / 50)
        turn, connection = number, None
        while time.monotonic() < until:
            started = time.monotonic()
            path = PAGES[turn % len(PAGES)]
            try:
                if connection is None:
                    connection = await asyncio.open_connection(self.host, self.port)
                async with asyncio.timeout(_ANSWER_SECONDS):
                    status = await self._get(*connection, path + VARIANTS[turn % len(VARIANTS)])
                into = self.first if started < self.settled_at else self.seconds[path]
                into.append(time.monotonic() - started)
                if status != 200:
                    self.wrong[f"{path}: status {status}"] += 1
            except (OSError, EOFError, TimeoutError) as error:
                self.wrong[f"{path}: {type(error).__name__}"] += 1
                connection = None
            turn += 1
            await asyncio.sleep(max(0.0, started + self.think - time.monotonic()))
        stream.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stream

    async def _get(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> int:
        """Ask for a page, read it whole, and return the status."""
        writer.write(self._request(path))
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = next((line.partition(":")[2] for line in head.splitlines() if line.startswith("content-length:")), "0")
        await reader.readexactly(int(length))
        return int(head.split()[1])

    async def _stream(self) -> None:
        """Hold a stream of events open and count what it brings."""
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            try:
                writer.write(self._request("/live"))
                if int((await reader.readuntil(b"\r\n\r\n")).split()[1]) != 200:
                    self.wrong["/live: refused"] += 1
                    return
                self.streams += 1
                while line := await reader.readline():
                    self.events += line.startswith(b"data:")
                self.wrong["/live: ended"] += 1
            finally:
                writer.close()
        except (OSError, EOFError) as error:
            self.wrong[f"/live: {type(error).__name__}"] += 1

    def _request(self, path: str) -> bytes:
        return f"GET {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nAccept: */*\r\n\r\n".encode()

    def report(self) -> dict[str, Any]:
        """Return the figures."""
        every = [seconds for found in self.seconds.values() for seconds in found]
        return {
            "pages": len(every),
            "page_seconds": quantiles(every),
            "first_page_seconds": quantiles(self.first),
            "by_page": {path: {"pages": len(found), **quantiles(found)} for path, found in sorted(self.seconds.items())},
            "streams": self.streams,
            "stream_events": self.events,
            "wrong": [f"{what} ({count} times)" for what, count in sorted(self.wrong.items())],
        }


async def watch(address: str, *, viewers: int, seconds: float, think: float, settle: float) -> dict[str, Any]:
    """Let so many viewers watch for so long; return the figures. Pages of the first ``settle`` seconds are counted separately."""
    all_viewers = Viewers(address, think=think, settle=settle)
    until = time.monotonic() + seconds
    async with asyncio.TaskGroup() as tasks:
        for number in range(viewers):
            tasks.create_task(all_viewers.watch(number, until))
    return all_viewers.report()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.viewers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address", help="of a console that runs, as http://127.0.0.1:3001")
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--think", type=float, default=2.0, help="seconds between two pages of a viewer")
    parser.add_argument(
        "--settle", type=float, default=5.0, help="seconds whose pages count as first pages, of a console just started"
    )
    args = parser.parse_args(argv)
    watching = watch(args.address, viewers=args.viewers, seconds=args.seconds, think=args.think, settle=args.settle)
    print(json.dumps(asyncio.run(watching)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
