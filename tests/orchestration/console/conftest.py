"""One home and one running console for all tests of the console that read only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from console import RunningConsole, running_console

from spark_jobs.config import Settings
from tests.orchestration.console.small_home import make_home


@pytest.fixture(scope="session")
def console_home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A small home with marts. Tests only read it."""
    return make_home(tmp_path_factory.mktemp("console") / "home")


@pytest.fixture(scope="session")
def console(console_home: Settings) -> Iterator[RunningConsole]:
    """The real program, running on that home."""
    with running_console(console_home.home) as running:
        yield running
