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
from urllib.parse import quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
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
        self._app, self._token = app, token
        self._setting = setting  # the token comes from it, and it names the cookie: the ports of a host share their cookies
        self._hosts = frozenset(name.lower() for name in (*LOOPBACK, *hosts))

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
        headers, scope = request.headers, request.scope
        hosts = headers.getlist("host")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        named = _HOST.fullmatch(host)
        if named is None or named["name"] not in self._hosts:
            return _refusal(HTTPStatus.FORBIDDEN, "its Host is not this machine (ADTALLY_WEBSERVER_HOSTS names others)")
        if any(origin.lower() not in (f"http://{host}", f"https://{host}") for origin in headers.getlist("origin")):
            return _refusal(HTTPStatus.FORBIDDEN, "its Origin is another one")
        if set(headers.getlist("sec-fetch-site")) - {"same-origin", "none"} and not _is_link(request):
            return _refusal(HTTPStatus.FORBIDDEN, "a page of another site sends it")
        if scope["type"] == "http" and scope["method"] in _READS:
            if scope["path"].rstrip("/").endswith("/graphql") and "query" in request.query_params:
                return _refusal(HTTPStatus.METHOD_NOT_ALLOWED, "GraphQL is asked by POST")
        elif scope["type"] == "http" and _content_type(headers) not in _CONTENT_TYPES:
            return _refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"its Content-Type is none of {', '.join(_CONTENT_TYPES)}")
        return None if self._token is None else self._answer_without_token(request, self._token)

    def _answer_without_token(self, request: HTTPConnection, token: str) -> Response | None:
        """Return the answer to a request without the token; None if it has it. A cookie replaces a token in the address."""
        name = self._setting.lower()
        cookie = hashlib.sha256(f"{name}:{token}".encode()).hexdigest()
        if _same(request.headers.get("authorization", ""), f"Bearer {token}") or _same(request.cookies.get(name, ""), cookie):
            return None
        if request.scope["type"] == "http" and _same(request.query_params.get("token", ""), token):
            rest = urlencode([(key, value) for key, value in request.query_params.multi_items() if key != "token"])
            path = f"/{quote(request.scope['path'].lstrip('/'))}"  # one slash: two would begin the name of another host
            answer = RedirectResponse(f"{path}{'?' if rest else ''}{rest}", HTTPStatus.SEE_OTHER)
            answer.set_cookie(name, cookie, httponly=True, samesite="strict")
            return answer
        how = f"it needs the token of {self._setting}, once as ?token=... in the address, or as the header Authorization: "
        return _refusal(HTTPStatus.UNAUTHORIZED, f"{how}Bearer ...", {"WWW-Authenticate": "Bearer"})


def _refusal(status: HTTPStatus, reason: str, headers: dict[str, str] | None = None) -> Response:
    return PlainTextResponse(f"adtally refuses this request: {reason}\n", status, headers)


def _content_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _is_link(request: HTTPConnection) -> bool:
    """Return whether a person opens the address in a window by a link, which can be on any page."""
    return (
        request.scope.get("method") == "GET"
        and request.headers.getlist("sec-fetch-mode") == ["navigate"]
        and request.headers.getlist("sec-fetch-dest") == ["document"]
    )


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())
