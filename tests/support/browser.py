"""Pages as a real browser shows them: Chromium without a window, operated through Playwright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Dialog, Page, sync_playwright
from setup_browser import INSTALL_CHROMIUM, find_chromium

DESKTOP, TABLET, PHONE = (1280, 800), (820, 1180), (390, 844)
SIZES = {"desktop": DESKTOP, "tablet": TABLET, "phone": PHONE}
"""Width and height of the window, in CSS pixels."""

_AXE = files("axe_playwright_python") / "axe.min.js"
_SERIOUS = ("serious", "critical")
_NO_NAMES = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE localhost , EXCLUDE 127.0.0.1"
"""No page can reach another machine, even if a test forgets to look at its requests."""


@contextmanager
def started_browser() -> Iterator[Browser]:
    """Start a browser and end it. Skips the test if no Chromium is installed."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip(f"Chromium is not installed (install it: {INSTALL_CHROMIUM})")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", _NO_NAMES])
        yield browser
        browser.close()


@dataclass
class RecordedPage:
    """A page, the addresses that it requested, and what went wrong on it."""

    page: Page
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Errors of scripts, refusals by the content security policy, answers with an error status, and dialogs."""

    def open(self, address: str) -> None:
        """Open an address and wait until the page and what it loads are there. Fails if the status is not 200."""
        answer = self.page.goto(address, wait_until="load")
        assert answer is not None and answer.status == 200, (address, answer and answer.status)

    def text(self) -> str:
        """Return the words that a person sees on the page, with single spaces."""
        return " ".join(self.page.inner_text("body").split())

    def wait_for_text(self, *words: str, seconds: float = 30) -> None:
        """Wait until the page shows all these words; fails with its text if it does not."""
        condition = "words => { const shown = document.body.innerText; return words.every(word => shown.includes(word)); }"
        try:
            self.page.wait_for_function(condition, arg=list(words), timeout=seconds * 1000)
        except Exception as error:
            shown = self.text()
            raise AssertionError(f"{[word for word in words if word not in shown]} is not on the page: {shown}") from error

    def foreign_requests(self, address: str) -> list[str]:
        """Return the requests, also of web sockets, to another host or port than that of an address."""
        own = urlsplit(address).netloc
        return [each for each in self.requests if urlsplit(each).netloc != own and not each.startswith(("data:", "blob:"))]

    def axe_findings(self) -> list[str]:
        """Return what the checker of accessibility calls serious or critical, a line a finding with its first elements."""
        self.page.evaluate(_AXE.read_text("utf-8"))
        found: list[dict[str, Any]] = self.page.evaluate("async () => (await axe.run()).violations")
        return [
            f"{each['id']} ({each['impact']}): {each['help']}: {[node['html'][:160] for node in each['nodes'][:5]]}"
            for each in found
            if each["impact"] in _SERIOUS
        ]

    def screenshot(self, path: Path) -> Path:
        """Write a picture of the whole page, also of what is below the window; return its path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path, full_page=True, animations="disabled")
        return path


@contextmanager
def recorded_page(browser: Browser, size: tuple[int, int] = DESKTOP, **options: Any) -> Iterator[RecordedPage]:
    """Open an empty page, with cookies and storage of its own. ``options``: those of Playwright's `new_context`."""
    width, height = size
    with browser.new_context(viewport={"width": width, "height": height}, **options) as context:
        page = context.new_page()
        recorded = RecordedPage(page)

        def dismiss(dialog: Dialog) -> None:
            recorded.errors.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        context.on("request", lambda request: recorded.requests.append(request.url))
        page.on("websocket", lambda socket: recorded.requests.append(socket.url))
        page.on("dialog", dismiss)
        page.on("pageerror", lambda error: recorded.errors.append(f"script: {error}"))
        page.on(
            "console",
            lambda said: recorded.errors.append(f"console: {said.text} {said.location}") if said.type == "error" else None,
        )
        yield recorded
