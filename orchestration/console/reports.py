"""Serves data docs, runbooks and the documentation: a browser opens no ``file://`` link from an http page."""

from __future__ import annotations

import mimetypes
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from orchestration.console import QUALITY
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError

if TYPE_CHECKING:
    from orchestration.console.rendering import Renderer

_SERVED = {".html", ".md", ".png", ".svg"}
# Great Expectations and dbt write pages with styles of their own.
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; frame-ancestors 'none'"
# dbt's page has scripts within it. In a sandbox they have an origin of their own: they reach no page of the console.
_SANDBOX_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data:; font-src data:; frame-ancestors 'none'"
)


def docs_dir() -> Path:
    """Return the folder of the documentation, which is bundled with an installed package, and beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    bundled = package / "docs"
    return bundled if (bundled / "runbooks").is_dir() else package.parent / "docs"


def report_routes(settings: Settings, renderer: Renderer) -> list[Route]:
    """The routes ``/docs/...``, ``/quality/...`` and ``/marts``, dbt's documentation of the marts."""
    folders = {"docs": docs_dir(), QUALITY: settings.quality_path}
    routes = [Route(f"/{name}/{{path:path}}", _endpoint(folder, renderer)) for name, folder in folders.items()]
    return [*routes, Route("/marts", lambda request: _mart_docs(settings, renderer, request))]


def _mart_docs(settings: Settings, renderer: Renderer, request: Request) -> Response:
    page = settings.marts_path.parent / "docs" / "index.html"
    try:
        return Response(page.read_bytes(), media_type="text/html", headers={"Content-Security-Policy": _SANDBOX_POLICY})
    except OSError:
        error = AdtallyError("the documentation of the marts was not written yet", hint="run `adtally marts docs`")
        return Response(renderer.error(request.url.path, error), 404, media_type="text/html")


def _endpoint(folder: Path, renderer: Renderer) -> Callable[[Request], Response]:
    def serve(request: Request) -> Response:
        file = _file(folder, request.path_params["path"])
        if file is None:
            return PlainTextResponse("there is no such page\n", 404)
        if file.suffix == ".md":
            return Response(renderer.document(file.stem, rendered(file)), media_type="text/html")
        kind = mimetypes.guess_type(file.name)[0] or "text/plain"
        return Response(file.read_bytes(), media_type=kind, headers={"Content-Security-Policy": _REPORT_POLICY})

    return serve


def _file(folder: Path, path: str) -> Path | None:
    """Return the file of a path; None if it is missing, outside the folder, or of another type (validations.json, locks)."""
    try:
        root, file = folder.resolve(), (folder / path.lstrip("/")).resolve()
        return file if file.is_relative_to(root) and file.suffix in _SERVED and file.is_file() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def rendered(file: Path) -> Markup:
    """Return a page of the documentation as HTML. HTML within its Markdown is shown as text."""
    from markdown_it import MarkdownIt

    return Markup(MarkdownIt("commonmark", {"html": False}).enable("table").render(file.read_text("utf-8")))
