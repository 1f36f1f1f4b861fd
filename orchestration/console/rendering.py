"""Makes the HTML of the pages. Jinja escapes every value; nothing from the data is ever marked as safe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from orchestration.console.filters import Filters
from orchestration.console.pages.accounting import shares
from orchestration.console.pages.campaigns import bar as pacing_bar
from orchestration.console.tables import money, shown
from orchestration.console.view import Page, View
from spark_jobs.attribution.rules import MODELS
from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError

TEMPLATES = Path(__file__).with_name("templates")
SPARK_WIDTH, SPARK_HEIGHT = 90, 22


class Renderer:
    """Renders pages with their frame: the menu, the filters, and what build and versions they show."""

    def __init__(self, settings: Settings, pages: Sequence[Page]) -> None:
        self._settings, self._pages = settings, pages
        self._templates = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=select_autoescape(default=True, default_for_string=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= {
            "shown": shown,
            "money": money,
            "iso": _iso,
            "json": _json,
            "sparkline": sparkline,
            "shares": shares,
            "commands": commands,
            "pacing_bar": pacing_bar,
        }
        self._templates.globals |= {"pages": [page for page in pages if page.in_menu], "webserver": settings.webserver_url}
        self._templates.globals["models"] = [(name, name.replace("_", " ")) for name in MODELS]

    def page(self, page: Page, view: View) -> bytes:
        """A page of the console. Raises AdtallyError where the data cannot be read."""
        shown_page = page.build(view)
        tables = {name: make(view) for name, make in page.tables.items()}
        arranged = {name: table.arranged(view.filters) for name, table in tables.items()}
        template = self._templates.get_template(f"{page.name}.html")
        return template.render(page=page, view=view, tables=arranged, **shown_page).encode()

    def fragment(self, template: str, **values: Any) -> bytes:
        """A part of a page, which the browser puts into it."""
        return self._templates.get_template(template).render(**values).encode()

    def error(self, path: str, error: AdtallyError) -> bytes:
        """The page that says what is wrong, and what to do about it."""
        template = self._templates.get_template("error.html")
        return template.render(path=path, filters=Filters(), message=error.message, hint=error.hint or "").encode()

    def document(self, title: str, body: Markup) -> bytes:
        """A page of the documentation. ``body`` is HTML of our own files."""
        return self._templates.get_template("document.html").render(title=title, body=body, filters=Filters(), path="").encode()


def sparkline(values: Sequence[float | int | Decimal | None]) -> Markup:
    """A small line as SVG, without a scale: the shape of a day."""
    known = [float(value or 0) for value in values]
    if len(known) < 2 or not any(known):
        return Markup('<svg class="spark" width="{}" height="{}" aria-hidden="true"></svg>').format(SPARK_WIDTH, SPARK_HEIGHT)
    top = max(known)
    step = SPARK_WIDTH / (len(known) - 1)
    points = " ".join(
        f"{index * step:.1f},{SPARK_HEIGHT - 2 - value / top * (SPARK_HEIGHT - 4):.1f}" for index, value in enumerate(known)
    )
    return Markup(
        '<svg class="spark" width="{w}" height="{h}" viewBox="0 0 {w} {h}" aria-hidden="true"><polyline points="{p}"/></svg>'
    ).format(w=SPARK_WIDTH, h=SPARK_HEIGHT, p=points)


def commands(text: str) -> Markup:
    """A text in which what is between backticks is shown as code."""
    return Markup().join(
        Markup("<code>{}</code>").format(part) if index % 2 else part for index, part in enumerate(text.split("`"))
    )


def _iso(value: datetime | date | None) -> str:
    """A time for a machine; times of the tables are UTC without a zone."""
    if value is None:
        return ""
    return value.isoformat() + ("Z" if isinstance(value, datetime) and value.tzinfo is None else "")


def _json(value: Any) -> str:
    """JSON for an attribute, which Jinja escapes."""
    return json.dumps(value, default=lambda item: float(item) if isinstance(item, Decimal) else str(item), separators=(",", ":"))
