"""Writes the data docs: a page a validation, and an index of the newest ones.

Great Expectations' site builder renders everything again at every build, and its pages load scripts and a logo from the network.
Here its renderers make only the body of one page; the frame is a template of this package, and a list gives the index.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, select_autoescape

from expectations.errors import DocsBusyError
from expectations.trailing import write_atomically

INDEX = "index.html"
KEPT = 1_000  # validations in the index; older pages are removed
_LIST = "validations.json"
_PAGES = "validations"
_TEMPLATES = Path(__file__).parent / "templates"
_PATIENCE_SECONDS = 60


@dataclass(frozen=True)
class Entry:
    """A line of the index. ``page`` is relative to the folder of the docs; an empty ``hour`` means the whole table."""

    page: str
    table: str
    hour: str
    version: int | None
    run_name: str
    rows: int
    expectations: int
    errors: int
    warnings: int
    validated_at: str


class DataDocs:
    """The data docs in ``folder``. Several processes may add to them at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def index(self) -> Path:
        """The start page."""
        return self.folder / INDEX

    def add(self, entry: Entry, result: Any, failing: dict[str, list[dict[str, Any]]], *, keep: int = KEPT) -> Path:
        """Add the page of a validation and update the index.

        ``failing``: check -> examples of failing rows. Removes the pages beyond the newest ``keep`` validations. Raises
        DocsBusyError if another process holds the index for a minute.
        """
        pages = self.folder / _PAGES
        pages.mkdir(parents=True, exist_ok=True)
        name = f"{entry.table}-{entry.hour or 'all'}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        entry = replace(entry, page=f"{_PAGES}/{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}.html")
        page = self.folder / entry.page
        write_atomically(page, _page(entry, result, failing))
        try:
            with FileLock(self.folder / ".docs.lock", timeout=_PATIENCE_SECONDS):
                listed = [entry, *self.entries()]
                write_atomically(self.folder / _LIST, json.dumps([asdict(each) for each in listed[:keep]]))
                write_atomically(self.index, _templates().get_template("index.html.j2").render(entries=listed[:keep]))
                for each in listed[keep:]:
                    (self.folder / each.page).unlink(missing_ok=True)
        except Timeout:
            raise DocsBusyError(f"the data docs in {self.folder} are being written by somebody else") from None
        return page

    def entries(self) -> list[Entry]:
        """Return the entries of the index, the newest first. A list that cannot be read counts as empty."""
        try:
            return [Entry(**entry) for entry in json.loads((self.folder / _LIST).read_text("utf-8"))]
        except (OSError, ValueError, TypeError):
            return []


def _page(entry: Entry, result: Any, failing: dict[str, list[dict[str, Any]]]) -> str:
    from great_expectations.render.renderer.page_renderer import ValidationResultsPageRenderer

    document = ValidationResultsPageRenderer().render(result)
    document.sections[0:1] = []  # the overview: numbers that the page's head has, and links into a site that is not built
    rendered: str = _view().render(document, template="page.html.j2", entry=entry, failing=failing)
    return rendered


@cache
def _view() -> Any:
    """Great Expectations' page view, in the frame of this package."""
    from great_expectations.render.view.view import DefaultJinjaPageView

    view = DefaultJinjaPageView()
    assert view.env.loader is not None
    view.env.loader = ChoiceLoader([FileSystemLoader(_TEMPLATES), view.env.loader])
    return view


@cache
def _templates() -> Environment:
    return Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=select_autoescape(["html.j2"]))
