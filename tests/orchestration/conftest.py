"""The command, run in the process of the test."""

from __future__ import annotations

import pytest
from terminal import Adtally, Done

from orchestration.cli import app


@pytest.fixture
def adtally(capsys: pytest.CaptureFixture[str]) -> Adtally:
    """Run the command in this process."""

    def call(*arguments: str) -> Done:
        capsys.readouterr()
        status = app.run(list(arguments))
        return Done(status, *capsys.readouterr())

    return call
