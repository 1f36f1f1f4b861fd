"""Which Java is taken, and what is said where it cannot be: scripts that answer as the Javas of this world do."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from spark_jobs.errors import MachineError
from spark_jobs.java import INSTALL_JAVA, Java, require_java, require_utf8_names, utf8_for_java

OURS = shutil.which("java", path=os.pathsep.join([f"{os.environ.get('JAVA_HOME', '')}/bin", os.environ["PATH"]])) or "java"
JAVA_17 = 'openjdk version "17.0.11" 2024-04-16'
JAVA_21 = 'openjdk version "21" 2023-09-19'
JAVA_8 = 'java version "1.8.0_401"'


@pytest.fixture(autouse=True)
def _no_java_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Neither a Java of this machine nor one that an earlier test found."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    require_java.cache_clear()
    yield
    require_java.cache_clear()


def java_in(home: Path, says: str, status: int = 0, before: str = "") -> Path:
    """A ``bin/java`` under ``home`` that answers on standard error, as Java does."""
    script = home / "bin" / "java"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_bytes(f"#!/bin/sh\n{before}\nprintf '%b\\n' '{says}' >&2\nexit {status}\n".encode())
    script.chmod(0o755)
    return script


def refusal() -> str:
    """The message where Java is refused, held to what every one of them must be."""
    with pytest.raises(MachineError) as caught:
        require_java()
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    assert "Spark needs Java 17 or 21" in message
    assert INSTALL_JAVA in message
    return message


@pytest.mark.parametrize(("says", "major"), [(JAVA_17, 17), (JAVA_21, 21), ('java version "21.0.4-ea" 2024', 21)])
def test_java_on_the_path(tmp_path: Path, says: str, major: int) -> None:
    script = java_in(tmp_path, says)
    assert require_java() == Java(script, major)


def test_options_that_java_repeats_are_not_its_version(tmp_path: Path) -> None:
    java_in(tmp_path, f"Picked up JAVA_TOOL_OPTIONS: -Dversion=8\\n{JAVA_17}")
    assert require_java().major == 17


def test_java_home_goes_before_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java_in(tmp_path, JAVA_8)
    chosen = java_in(tmp_path / "jdk", JAVA_21)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    assert require_java() == Java(chosen, 21)


def test_an_empty_java_home_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = java_in(tmp_path, JAVA_17)
    monkeypatch.setenv("JAVA_HOME", "")
    assert require_java() == Java(script, 17)


def test_no_java() -> None:
    message = refusal()
    assert message.startswith("Java is not installed; ")
    assert "JAVA_HOME" not in message


def test_java_home_without_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java_in(tmp_path, JAVA_17)  # Spark would not take the one on PATH, so neither is it taken here
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "gone"))
    message = refusal()
    assert f"JAVA_HOME is {tmp_path / 'gone'}, where no Java is" in message
    assert "unset JAVA_HOME" in message


@pytest.mark.parametrize(
    ("says", "named"), [(JAVA_8, "is Java 8"), ('openjdk version "11.0.2"', "is Java 11"), ("version", "tell")]
)
@pytest.mark.parametrize("by", ["PATH", "JAVA_HOME"])
def test_a_java_that_spark_does_not_run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, named: str, by: str) -> None:
    script = java_in(tmp_path, says)
    if by == "JAVA_HOME":
        monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    message = refusal()
    assert str(script) in message and named in message
    assert ("unset JAVA_HOME" in message) == (by == "JAVA_HOME")


def test_a_java_too_new(tmp_path: Path) -> None:
    java_in(tmp_path, 'openjdk version "24.0.1"')
    assert "is Java 24" in refusal()


def test_a_java_that_does_not_start(tmp_path: Path) -> None:
    java_in(tmp_path, "The operation couldn\\0342\\0200\\0231t be completed. \\0351", status=1)  # the last is not UTF-8
    assert "does not tell its version" in refusal()


def test_a_java_that_cannot_be_run(tmp_path: Path) -> None:
    script = java_in(tmp_path, JAVA_17)
    script.write_bytes(b"\x7fELF of another machine")
    assert "does not tell its version" in refusal()


def test_java_is_asked_once_a_process(tmp_path: Path) -> None:
    java_in(tmp_path, JAVA_17, before=f"echo asked >> {tmp_path}/asked")
    assert require_java() is require_java()
    assert (tmp_path / "asked").read_text() == "asked\n"


def test_java_takes_file_names_for_utf8_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it does not list a file with an accent in its name, and nobody is told."""
    monkeypatch.setenv("LC_ALL", "C")
    command = [OURS, "-XshowSettings:properties", "-version"]
    with utf8_for_java():
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "sun.jnu.encoding = UTF-8" in told
    assert os.environ["LC_ALL"] == "C"
    assert "sun.jnu.encoding = UTF-8" not in subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_a_python_of_another_encoding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_utf8_names()
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "iso8859-1")
    with pytest.raises(MachineError, match="file names are iso8859-1"):
        require_utf8_names()
