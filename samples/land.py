"""Puts the samples into a landing folder as a collector would: write under a hidden name, set the mtime, rename."""

from __future__ import annotations

import json
from pathlib import Path

from services.simulator.landing import put_file

_HERE = Path(__file__).parent


def land(dest: Path) -> Path:
    """Copy the sample files into the landing folder ``dest`` with the mtimes of files.json, in their order.

    A file that is already there (same size and mtime) is left alone, so landing twice changes nothing. Returns the path
    of the samples' truth.json. Raises FileNotFoundError if a sample file is missing.
    """
    for entry in json.loads((_HERE / "files.json").read_text(encoding="utf-8")):
        content = (_HERE / "landing" / entry["path"]).read_bytes()
        target = dest / entry["path"]
        if target.exists():
            there = target.stat()
            if there.st_size == len(content) and there.st_mtime_ns == entry["mtime_ms"] * 1_000_000:
                continue
        put_file(target, content, entry["mtime_ms"])
    return _HERE / "truth.json"
