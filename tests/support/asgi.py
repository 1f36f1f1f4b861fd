"""Asks an ASGI application without a server: enough of HTTP for a page."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_VOID = {"meta", "link", "input", "br", "img", "rect", "polyline"}


@dataclass(frozen=True)
class Answer:
    """An answer: its status, headers by lower-case name, and body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()

    @property
    def page(self) -> ParsedPage:
        """The body as HTML."""
        parsed = ParsedPage()
        parsed.feed(self.text)
        return parsed


@dataclass
class Element:
    """An element with its attributes and all text within it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""


class ParsedPage(HTMLParser):
    """The elements of a page, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self._open: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        """Close the nearest element of this name."""
        for index in range(len(self._open) - 1, -1, -1):
            if self._open[index].tag == tag:
                del self._open[index:]
                return

    def handle_data(self, data: str) -> None:
        """Add text to all open elements."""
        for element in self._open:
            element.text += data

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """The elements of a name that have these attributes; ``hx_get`` is ``hx-get``."""
        wanted = {name.replace("_", "-"): value for name, value in attributes.items()}
        return [each for each in self.elements if each.tag == tag and wanted.items() <= each.attributes.items()]

    def addresses(self) -> list[str]:
        """All addresses that the page names."""
        return [value for each in self.elements for name, value in each.attributes.items() if name in ("href", "src", "hx-get")]


@dataclass
class Client:
    """Sends requests to an application as a browser on this machine does."""

    app: ASGIApp
    headers: dict[str, str] = field(default_factory=lambda: {"host": "127.0.0.1"})

    def get(self, address: str) -> Answer:
        """The answer to a GET of a path with a query. In a thread: the browser of other tests has the loop of this one."""
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, self._get(address)).result()

    async def _get(self, address: str) -> Answer:
        parts = urlsplit(address)
        scope: dict[str, Any] = {
            "type": "http",
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": unquote(parts.path),
            "raw_path": parts.path.encode(),
            "query_string": parts.query.encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in self.headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        sent: list[MutableMapping[str, Any]] = []

        async def receive() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        start = next(message for message in sent if message["type"] == "http.response.start")
        body = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
        return Answer(start["status"], {name.decode(): value.decode() for name, value in start["headers"]}, body)
