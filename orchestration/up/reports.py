"""Serves data docs and runbooks over http while ``adtally up`` runs, since a browser opens no ``file://`` link from an http page.

The server only reads, listens on the loopback address, and answers only requests whose Host is this address. So a website whose
name resolves to the loopback address gets nothing.
"""

from __future__ import annotations

import html
import mimetypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from socketserver import TCPServer
from string import Template
from urllib.parse import unquote

from orchestration.up.services import HOST
from spark_jobs.config import Settings

QUALITY = "quality"

_SERVED = {".html", ".md", ".png", ".svg"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_INDEX = """# adtally: reports and runbooks

{data_docs}

[Runbooks](/docs/runbooks/README.md)

[Dagster: a tour](/docs/dagster.md)

[Measures](/docs/metrics.md)

[Rules](/docs/rules.md)
"""


def docs_dir() -> Path:
    """Return the folder of the documentation, which is bundled with an installed package, and beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    bundled = package / "docs"
    return bundled if (bundled / "runbooks").is_dir() else package.parent / "docs"


@contextmanager
def serving_reports(settings: Settings, port: int) -> Iterator[str]:
    """Serve while in the context; yields the address. Uses a free port if ``port`` is taken."""
    handler = partial(_Handler, {"docs": docs_dir(), QUALITY: settings.quality_path})
    try:
        server = _Server((HOST, port), handler)
    except OSError:
        server = _Server((HOST, 0), handler)
    with server:
        threading.Thread(target=server.serve_forever, daemon=True, name="reports").start()
        try:
            yield f"http://{HOST}:{server.server_port}"
        finally:
            server.shutdown()


class _Server(ThreadingHTTPServer):
    def server_bind(self) -> None:
        """Bind as the base class does, but without its slow query for the name of the address."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors of a connection, such as a browser that leaves in the middle of a page."""


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD below ``/<name>/`` with files of the folder of that name, and ``/`` with a table of contents."""

    server: _Server
    server_version, sys_version = "adtally", ""
    timeout = 30.0

    def __init__(self, folders: dict[str, Path], *arguments: object) -> None:
        self._folders = folders
        super().__init__(*arguments)  # type: ignore[arg-type]  # socketserver's own arguments

    def do_GET(self) -> None:
        """Answer with a page."""
        path = unquote(self.path.partition("?")[0])
        if self.headers.get("Host") not in {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}:
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"this server answers to its own address only\n")
        elif path == "/":
            is_built = (self._folders[QUALITY] / "index.html").is_file()
            data_docs = f"[Data docs](/{QUALITY}/index.html)" if is_built else "Data docs: no hour has been validated yet."
            self._answer(HTTPStatus.OK, "text/html", _page("adtally", _INDEX.format(data_docs=data_docs)))
        elif (file := self._file(path)) is None:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page\n")
        elif file.suffix == ".md":
            self._answer(HTTPStatus.OK, "text/html", _page(file.stem, file.read_text("utf-8")))
        else:
            self._answer(HTTPStatus.OK, mimetypes.guess_type(file.name)[0] or "text/plain", file.read_bytes())

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the output is the terminal of ``adtally up``."""

    def _file(self, path: str) -> Path | None:
        """Return the file of a path; None if it is missing, outside the folder, or of another type (validations.json, locks)."""
        start, _, rest = path.partition("/")[2].partition("/")
        if (folder := self._folders.get(start)) is None:
            return None
        try:
            file = (folder / rest.lstrip("/")).resolve()
            return file if file.is_relative_to(folder.resolve()) and file.suffix in _SERVED and file.is_file() else None
        except (OSError, ValueError):  # a name that no file can have
            return None

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        kind = f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
        for name, value in (_HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _page(title: str, markdown: str) -> bytes:
    from markdown_it import MarkdownIt  # here, since the definitions import this module and render nothing

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    template = (files("orchestration.up") / "page.html").read_text("utf-8")
    return Template(template).substitute(title=html.escape(title), body=body).encode()
