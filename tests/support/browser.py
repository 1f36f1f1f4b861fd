"""Pages as a real browser shows them."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def page_html(address: str, profile: Path, *, seconds: int = 10) -> str:
    """What a browser makes of a page, as HTML, after its scripts had so many seconds. ``profile``: a folder of its own."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    budget = f"--virtual-time-budget={seconds * 1000}"
    return subprocess.run([*command, budget, "--dump-dom", address], capture_output=True, text=True, timeout=180, check=True).stdout


def page_text(address: str, profile: Path, *, seconds: int = 10) -> str:
    """The words of a page, as `page_html` gets it."""
    shown = re.sub(r"(?s)<(script|style)\b.*?</\1>", " ", page_html(address, profile, seconds=seconds))
    return " ".join(html.unescape(re.sub("<[^>]+>", " ", shown)).split())
