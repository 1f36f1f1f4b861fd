"""Stands in for `python -m orchestration.cli` when the benchmark of the console is tested: pages and a stream of events."""

from __future__ import annotations

import asyncio
import sys


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of a connection."""
    try:
        while True:
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
            if path == b"/live":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
                while True:
                    writer.write(b"event: live\ndata: {}\n\n")
                    await writer.drain()
                    await asyncio.sleep(0.5)
            status = b"500 Broken" if path.startswith(b"/billing") and "--broken" in sys.argv else b"200 OK"
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\nok")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def serve() -> None:
    """Serve on a free port and say which."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(f"console: http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__" and sys.argv[1] == "console":
    asyncio.run(serve())
