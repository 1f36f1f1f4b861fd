"""One home and one running console for all tests of the console that read only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from asgi import Client
from console import RunningConsole, running_console

from orchestration.console.app import create_app
from spark_jobs.config import Settings
from tests.orchestration.console.small_home import make_home
from tests.orchestration.console.twice_built import TwiceBuilt, build_twice


@pytest.fixture(scope="session")
def console_home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A small home with marts. Tests only read it."""
    return make_home(tmp_path_factory.mktemp("console") / "home")


@pytest.fixture(scope="session")
def console(console_home: Settings) -> Iterator[RunningConsole]:
    """The real program, running on that home."""
    with running_console(console_home.home) as running:
        yield running


@pytest.fixture(scope="session")
def twice_built(tmp_path_factory: pytest.TempPathFactory) -> TwiceBuilt:
    """A home whose marts were built before and after a late click. Tests only read it."""
    return build_twice(tmp_path_factory.mktemp("twice"))


@pytest.fixture(scope="session")
def client(twice_built: TwiceBuilt) -> Client:
    """Requests to a console of that home, with the figures of the marts."""
    return Client(create_app(twice_built.settings))
