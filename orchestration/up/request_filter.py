"""Filters requests to Dagster's webserver and the console: only their own pages, and programs on this machine, may call them.

Dagster asks for no password, runs mutations sent by GET, and accepts any Host, any Origin and any WebSocket. A browser on this
machine sends it the requests of any web page. The rules of this filter need no login:

- Host must be the loopback address or a host of ADTALLY_WEBSERVER_HOSTS, so a foreign name that resolves to loopback is refused.
- Requests of a page of another origin are refused: Origin must be the host itself, and Sec-Fetch-Site must say so. A link that a
  person opens is allowed, because it changes nothing.
- GraphQL by GET is refused. A POST must have the content type JSON or GraphQL, which a form cannot send.
- No page may show the UI within a frame.
- If ADTALLY_WEBSERVER_TOKEN (or ADTALLY_CONSOLE_TOKEN) is set, every request needs the token.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^:\[\]/@]+)(?::\d{1,5})?")
_READS = ("GET", "HEAD", "OPTIONS")
_CONTENT_TYPES = ("application/json", "application/graphql")
_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class RequestFilter:
    """An ASGI application that forwards the requests that the rules of this module allow."""

    def __init__(
        self, app: ASGIApp, *, hosts: Iterable[str] = (), token: str | None = None, setting: str = "ADTALLY_WEBSERVER_TOKEN"
    ) -> None:
        self._app = app
        self._setting = setting  # where the token comes from; it also names the cookie, since a host's ports share cookies
        self._hosts = frozenset(name.lower() for name in (*LOOPBACK, *hosts))
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or forward it to the application."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        answer = self._answer(HTTPConnection(scope))
        if answer is not None and scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.append(name, value)  # in addition to Dagster's own policy: both apply
            await send(message)

        await (answer or self._app)(scope, receive, send_with_headers)

    def _answer(self, request: HTTPConnection) -> Response | None:
        """Return the answer that replaces the application's; None if the request is allowed."""
        refusal = self._foreign(request) or self._wrong_form(request)
        if refusal is not None:
            status, reason = refusal
            return PlainTextResponse(f"adtally refuses this request: {reason}\n", status)
        return None if self._token is None else self._without_token(request, self._token)

    def _foreign(self, request: HTTPConnection) -> tuple[HTTPStatus, str] | None:
        """Return why a request may come from a foreign page; None if it does not."""
        hosts = request.headers.getlist("host")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        named = _HOST.fullmatch(host)
        if named is None or named["name"] not in self._hosts:
            return HTTPStatus.FORBIDDEN, "its Host is not this machine (ADTALLY_WEBSERVER_HOSTS names others)"
        if any(_origin_host(origin) != host for origin in request.headers.getlist("origin")):
            return HTTPStatus.FORBIDDEN, "its Origin is another one"
        if set(request.headers.getlist("sec-fetch-site")) - {"same-origin", "none"} and not _is_link(request):
            return HTTPStatus.FORBIDDEN, "a page of another site sends it"
        return None

    @staticmethod
    def _wrong_form(request: HTTPConnection) -> tuple[HTTPStatus, str] | None:
        """Return why a request that may change something has a form that a foreign page can send; None if it has not."""
        if request.scope["type"] == "websocket":
            return None
        if request.scope["method"] in _READS:
            if request.scope["path"].rstrip("/").endswith("/graphql") and "query" in request.query_params:
                return HTTPStatus.METHOD_NOT_ALLOWED, "GraphQL is asked by POST"
            return None
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in _CONTENT_TYPES:
            return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"its Content-Type is none of {', '.join(_CONTENT_TYPES)}"
        return None

    def _without_token(self, request: HTTPConnection, token: str) -> Response | None:
        """Return the answer to a request without the token; None if it has it. A token in the address is replaced by a cookie."""
        name = self._setting.lower()
        cookie = hashlib.sha256(f"{name}:{token}".encode()).hexdigest()
        if _same(request.headers.get("authorization", ""), f"Bearer {token}") or _same(request.cookies.get(name, ""), cookie):
            return None
        if request.scope["type"] == "http" and _same(request.query_params.get("token", ""), token):
            rest = urlencode([(key, value) for key, value in request.query_params.multi_items() if key != "token"])
            # one slash: two would begin the name of another host
            answer = RedirectResponse(
                f"/{quote(request.scope['path'].lstrip('/'))}{'?' if rest else ''}{rest}", HTTPStatus.SEE_OTHER
            )
            answer.set_cookie(name, cookie, httponly=True, samesite="strict")
            return answer
        return PlainTextResponse(
            f"adtally refuses this request: it needs the token of {self._setting}, once as ?token=... in the address, "
            "or as the header Authorization: Bearer ...\n",
            HTTPStatus.UNAUTHORIZED,
            {"WWW-Authenticate": "Bearer"},
        )


def _origin_host(origin: str) -> str | None:
    """Return host and port of an origin; None for `null` and schemes other than http."""
    try:
        parts = urlsplit(origin.lower())
    except ValueError:
        return None
    return parts.netloc if parts.scheme in ("http", "https") else None


def _is_link(request: HTTPConnection) -> bool:
    """Return whether a person opens the address in a window by a link, which can be on any page."""
    return (
        request.scope.get("method") == "GET"
        and request.headers.getlist("sec-fetch-mode") == ["navigate"]
        and request.headers.getlist("sec-fetch-dest") == ["document"]
    )


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())
