"""Runs a real ``adtally console`` on a home, and reads the address that it prints."""

from __future__ import annotations

import http.client
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from terminal import environment, spawn

START_SECONDS = 60


@dataclass
class RunningConsole:
    """A console that was started. ``address`` has no slash at its end."""

    process: subprocess.Popen[str]
    started: float
    address: str = ""
    seconds_to_start: float = 0.0
    lines: list[str] = field(default_factory=list)
    """What it printed, both streams."""

    def read(self, ready: threading.Event) -> None:
        """Keep the lines that it prints; note the first address."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found and not self.address:
                self.address, self.seconds_to_start = found[0], time.monotonic() - self.started
                ready.set()
        ready.set()

    def end(self, number: signal.Signals = signal.SIGINT, *, seconds: float = 30) -> int:
        """Send a signal, wait for the end, and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def running_console(home: Path, *arguments: str, **changes: str) -> Iterator[RunningConsole]:
    """Start the console of a home on a free port; end it. ``changes``: environment variables."""
    started = time.monotonic()
    process = spawn(
        *("--home", str(home), "console", "--port", "0", *arguments),
        cwd=home,
        env=environment(**{"PYTHONUNBUFFERED": "1", **changes}),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    console = RunningConsole(process, started)
    ready = threading.Event()
    reader = threading.Thread(target=console.read, args=(ready,), daemon=True)
    reader.start()
    try:
        assert ready.wait(START_SECONDS) and console.address, console.lines
        yield console
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(10)


def ask_bytes(
    console: RunningConsole, path: str, headers: dict[str, str] | None = None, method: str = "GET"
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send a request by plain HTTP; status, headers and body of the answer."""
    parts = urlsplit(console.address)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        connection.request(method, path, headers=headers or {}, body="{}" if method == "POST" else None)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def ask(
    console: RunningConsole, path: str, headers: dict[str, str] | None = None, method: str = "GET"
) -> tuple[int, http.client.HTTPMessage, str]:
    """Send a request by plain HTTP; status, headers and text of the answer."""
    status, answered, body = ask_bytes(console, path, headers, method)
    return status, answered, body.decode("utf-8", "replace")
