"""The console's web application: routes, headers, cache, and the stream of changes."""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from orchestration.console.filters import Filters
from orchestration.console.live import LiveFigures, LiveState, utc_now
from orchestration.console.marts import PublishedMarts, export_mart
from orchestration.console.pages import PAGES
from orchestration.console.rendering import Renderer
from orchestration.console.reports import report_routes
from orchestration.console.view import Page, View
from orchestration.up.request_filter import RequestFilter
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, UsageError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

STATIC = Path(__file__).with_name("static")
REFRESH_SECONDS = 0.5
"""How often the tables' logs are looked at: listing two folders."""

_KEEP_ALIVE_SECONDS = 15.0
_CACHED_PAGES = 256
_CHUNK = 256 * 1024
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-cache",
}
_FILE_TYPES = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}

Key = tuple[object, ...]


@dataclass
class _KeptPage:
    """A page of the cache. ``begun``: when somebody last began to make it, by the monotonic clock."""

    html: Future[bytes] = field(default_factory=Future)
    begun: float = field(default_factory=time.monotonic)


class ConsoleState:
    """The application's state: the marts, the live figures, the cache of pages, and who waits for changes."""

    def __init__(self, settings: Settings, is_ending: Callable[[], bool] = lambda: False) -> None:
        self.settings = settings
        self.is_ending = is_ending
        self.marts = PublishedMarts(settings)
        self.live = LiveFigures(settings)
        self.renderer = Renderer(settings, PAGES)
        self._pages: OrderedDict[Key, _KeptPage] = OrderedDict()
        self._pages_lock = Lock()
        self._background = ThreadPoolExecutor(1, "pages")
        self._changed = asyncio.Condition()
        self._version: tuple[LiveState, str] = (LiveState(), "")

    async def watch(self) -> None:
        """Refresh the live figures for ever, and wake up those who wait whenever they, or the marts, have changed."""
        while True:
            state = await run_in_threadpool(self.live.refresh)
            version = (state, await run_in_threadpool(self.marts.build_id))
            if version != self._version or self.is_ending():
                self._version = version
                async with self._changed:
                    self._changed.notify_all()
            await asyncio.sleep(max(REFRESH_SECONDS, self.live.poll_seconds))

    async def changes(self) -> AsyncIterator[str]:
        """Server-sent events: one now, one after each change, and comments that keep the connection open, until the server ends."""
        seen: tuple[LiveState, str] | None = None
        while not self.is_ending():
            if self._version != seen:
                seen = self._version
                state, build = seen
                yield f"event: live\ndata: {json.dumps({**asdict(state), 'build': build}, default=str)}\n\n"
            try:
                await asyncio.wait_for(self._wait_for_change(seen), _KEEP_ALIVE_SECONDS)
            except TimeoutError:
                yield ": still here\n\n"

    async def _wait_for_change(self, seen: tuple[LiveState, str]) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._version != seen or self.is_ending())

    def page(self, page: Page, request: Request) -> bytes:
        """The HTML of a page, made once for all who ask while nothing changed. Raises AdtallyError.

        A page that is made again after some seconds is made in the background: whoever asks then gets the one before.
        """
        with self.marts.opened() as build:
            view = self.view(request, build)
            live = view.live_state if page.is_live else view.live_state.days
            key = (view.path, request.url.query, build.signature, live)
            with self._pages_lock:
                kept = self._pages.get(key)
                is_missing = kept is None
                if kept is None:
                    kept = self._pages[key] = _KeptPage()
                is_old = kept.html.done() and 0 < page.seconds < time.monotonic() - kept.begun
                if is_old:
                    kept.begun = time.monotonic()
                self._pages.move_to_end(key)
                while len(self._pages) > _CACHED_PAGES:
                    self._pages.popitem(last=False)
            html = kept.html
            if is_missing:
                self._make(key, html, page, view)
            elif is_old:
                self._background.submit(self._make_again, key, page, request)
            return html.result()

    def _make(self, key: Key, html: Future[bytes], page: Page, view: View) -> None:
        try:
            html.set_result(self.renderer.page(page, view))
        except BaseException as error:
            html.set_exception(error)
            with self._pages_lock:
                self._pages.pop(key, None)

    def _make_again(self, key: Key, page: Page, request: Request) -> None:
        html: Future[bytes] = Future()
        with self.marts.opened() as build:
            self._make(key, html, page, self.view(request, build))
        with self._pages_lock:
            if html.exception() is None and key in self._pages:
                self._pages[key].html = html

    def table(self, page: Page, name: str, form: str, request: Request) -> tuple[bytes, str]:
        """A table of a page as a file, and the file's name."""
        make = page.tables.get(name)
        if make is None:
            raise UsageError(f"page {page.name} has no table {name!r}", hint=f"it has {', '.join(page.tables)}")
        with self.marts.opened() as build:
            view = self.view(request, build)
            table = make(view).arranged(view.filters, limit=None)
            return table.export(form, build.build_id, view.stamp(page)), f"adtally-{page.name}-{name}-{build.build_id}.{form}"

    def mart(self, name: str, form: str) -> tuple[IO[bytes], str]:
        """A whole mart as a temporary file, and its name for the browser."""
        file = TemporaryFile()  # noqa: SIM115 - the answer reads it
        with self.marts.opened() as build:
            export_mart(build, name, form, file)
            file.seek(0)
            return file, f"adtally-{name}-{build.build_id}.{form}"

    def view(self, request: Request, build: Any) -> View:
        """The view of a request."""
        values = {**request.query_params, **request.path_params}
        extras = {name: value for name, value in request.query_params.items() if name not in Filters.names()}
        path = quote(request.scope["path"])  # request.url.path ends at an encoded question mark
        return View(self.settings, build, self.live, self.live.state, Filters.of(values), path, utc_now(), values, extras)

    def close(self) -> None:
        """Close the databases."""
        self._background.shutdown(cancel_futures=True)
        self.live.close()
        self.marts.close()


def create_app(settings: Settings, is_ending: Callable[[], bool] = lambda: False) -> ASGIApp:
    """Make the application. It only reads, and answers only its own pages, to requests that `RequestFilter` allows.

    ``is_ending``: whether the server is about to end. Streams of events then end too, for it waits for them.
    """
    console = ConsoleState(settings, is_ending)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(console.watch())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            console.close()

    def page_endpoint(page: Page) -> Callable[[Request], Response]:
        return lambda request: _html(console, request, lambda: console.page(page, request))

    def export(request: Request) -> Response:
        form = request.path_params["form"]
        page = next((page for page in PAGES if page.name == request.path_params["page"]), None)

        try:
            if form not in _FILE_TYPES:
                raise UsageError(f"there is no export {form!r}", hint="csv or parquet")
            if page is None:
                file, name = console.mart(request.path_params["table"], form)
                return StreamingResponse(
                    iter(partial(file.read, _CHUNK), b""), headers=_attached(name), media_type=_FILE_TYPES[form]
                )
            body, name = console.table(page, request.path_params["table"], form, request)
        except AdtallyError as error:
            return Response(console.renderer.error(request.url.path, error), HTTPStatus.BAD_REQUEST, media_type="text/html")
        return Response(body, headers=_attached(name), media_type=_FILE_TYPES[form])

    async def live(_: Request) -> Response:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(console.changes(), media_type="text/event-stream", headers=headers)

    routes = [
        *(Route(page.path, page_endpoint(page)) for page in PAGES),
        Route("/export/{page}/{table}.{form}", export),
        Route("/live", live),
        *report_routes(settings, console.renderer),
        Mount("/static", StaticFiles(directory=STATIC), name="static"),
    ]

    def not_found(request: Request, _: Exception) -> Response:
        page = console.renderer.error(request.url.path, UsageError("there is no such page"))
        return Response(page, HTTPStatus.NOT_FOUND, media_type="text/html")

    def failed(request: Request, error: Exception) -> Response:  # the trace goes to the log
        page = console.renderer.error(
            request.url.path, AdtallyError(f"this page failed: {type(error).__name__}", hint="see the console's log")
        )
        return Response(page, HTTPStatus.INTERNAL_SERVER_ERROR, media_type="text/html")

    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: not_found, Exception: failed})
    app.router.redirect_slashes = False
    token = None if settings.console_token is None else settings.console_token.get_secret_value()
    return RequestFilter(_Headers(app), hosts=settings.webserver_hosts, token=token, setting="ADTALLY_CONSOLE_TOKEN")


class _Headers:
    """Adds the headers that an answer does not set itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _html(console: ConsoleState, request: Request, make: Callable[[], bytes]) -> Response:
    try:
        return Response(make(), media_type="text/html")
    except AdtallyError as error:
        status = HTTPStatus.BAD_REQUEST if isinstance(error, UsageError) else HTTPStatus.OK
        return Response(console.renderer.error(request.url.path, error), status, media_type="text/html")


def _attached(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}
