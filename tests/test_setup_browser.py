"""How Chromium comes onto a machine that runs the tests of pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import setup_browser


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder with programs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return tmp_path


def test_a_browser_that_is_there_is_used(folder: Path) -> None:
    program(folder, "chromium", "exit 0")
    program(folder, "apt-get", f"/bin/touch {folder}/asked")
    assert setup_browser.main() == 0
    assert setup_browser.find_chromium() == str(folder / "chromium")
    assert not (folder / "asked").exists()


def test_apt_installs_one_that_is_missing(folder: Path) -> None:
    program(folder, "apt-get", f'[ "$1" = update ] || {{ /bin/cp "$0" {folder}/chromium; echo "$@" > {folder}/asked; }}')
    assert setup_browser.main() == 0
    assert (folder / "asked").read_text() == "install -y -qq --no-install-recommends chromium\n"


@pytest.mark.parametrize("with_apt", [False, True])
def test_where_it_cannot_be_installed_it_is_said(folder: Path, with_apt: bool, capsys: pytest.CaptureFixture[str]) -> None:
    if with_apt:
        program(folder, "apt-get", "exit 100")
    assert setup_browser.main() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and setup_browser.INSTALL_CHROMIUM in said


def test_without_the_right_to_install_nobody_is_asked_for_a_password(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    program(folder, "apt-get", f"/bin/touch {folder}/asked")
    assert setup_browser.main() == 2
    assert not (folder / "asked").exists()
    program(folder, "sudo", f"printf '%s' $1 > {folder}/sudo-asked; exit 1")
    assert setup_browser.main() == 2
    assert (folder / "sudo-asked").read_text() == "-n"
