"""Runs the console on the loopback address."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from orchestration.console.app import create_app
from orchestration.up.services import HOST, free_port
from spark_jobs.config import Settings


def serve(settings: Settings, port: int, ready: Callable[[str], None]) -> None:
    """Serve the console until a signal ends it; 0 takes a free port. Calls ``ready`` with its address once it can be asked.

    Raises UsageError if the port is taken.
    """
    port = free_port(port)
    server: _Server = _Server(
        uvicorn.Config(
            create_app(settings, lambda: server.should_exit),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,  # for a page that takes long; streams of events end by themselves
            lifespan="on",
        ),
        lambda: ready(f"http://{HOST}:{port}"),
    )
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says when it has started, and ends without an error when a signal asks it to."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        await super().startup(sockets)
        if self.started:
            self._tell_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End at the first signal, at once at a second one. uvicorn's own handler also raises the signal again at the end."""
        self.force_exit = self.should_exit
        self.should_exit = True
