"""What the tests with real services share: their jars, resolved once for the user, and Java."""

from __future__ import annotations

from pathlib import Path

import pytest

from spark_jobs.config import load_settings
from spark_jobs.java import require_java


@pytest.fixture(scope="session")
def jar_cache() -> Path:
    """The user's own cache: what `adtally services` uses."""
    return load_settings().jar_cache_path


@pytest.fixture(scope="session")
def java() -> Path:
    return require_java().executable
