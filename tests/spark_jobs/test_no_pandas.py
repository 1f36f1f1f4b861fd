"""The ingest and its workers load no pandas."""

from __future__ import annotations

import re
from pathlib import Path

import lake
import pytest
import terminal

from spark_jobs.config import load_settings

pytestmark = pytest.mark.homes


def loaded(text: str) -> set[str]:
    """Return the modules that a process loaded, by what PYTHONPROFILEIMPORTTIME made it print."""
    return set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", text, re.MULTILINE))


def test_neither_an_ingest_nor_its_workers_load_pandas(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path / "home")
    lake.land(settings, "events/eu/0.jsonl", [lake.event("e0"), lake.event("e1", price_micros="no number")])
    environment = terminal.environment(PYTHONPROFILEIMPORTTIME="1", ADTALLY_CACHE_DIR=str(settings.jar_cache_path.parent))
    done = terminal.run("--home", str(settings.home_path), "ingest", cwd=tmp_path, env=environment, timeout=300)
    assert (done.status, done.out) == (
        0,
        "1 batch: 2 offered = 1 accepted + 0 duplicate + 0 conflict + 1 rejected; 0 of the accepted late\n",
    )
    of_workers = loaded((settings.home_path / "logs" / "java.log").read_text("utf-8", "replace"))
    for modules in (loaded(done.err), of_workers):
        assert {"spark_jobs.ingest.write", "pyarrow.lib"} <= modules
        assert not {name for name in modules if name.startswith("pandas.")}
