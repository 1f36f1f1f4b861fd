"""Finds the Java that Spark runs on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from spark_jobs.errors import MachineError

SUPPORTED_JAVA = (17, 21)
INSTALL_JAVA = "sudo apt-get install -y openjdk-17-jre-headless"

_VERSION = re.compile(r'version "(?:1\.)?(\d+)')


@dataclass(frozen=True)
class Java:
    """A Java that Spark can use: the executable and its major version."""

    executable: Path
    major: int


@lru_cache(maxsize=1)
def require_java() -> Java:
    """Return the Java that Spark will start: that of JAVA_HOME if it is set, else the one on PATH.

    Raises MachineError, with the command that installs Java, if it is missing or neither 17 nor 21.
    """
    home = os.environ.get("JAVA_HOME")
    if home:
        executable = Path(home) / "bin" / "java"
        if not os.access(executable, os.X_OK):
            raise _unusable(f"JAVA_HOME is {home}, where no Java is")
    else:
        found = shutil.which("java")
        if found is None:
            raise _unusable("Java is not installed")
        executable = Path(found)
    major = _major_version(executable)
    if major not in SUPPORTED_JAVA:
        version = "does not tell its version" if major is None else f"is Java {major}"
        raise _unusable(f"{executable} {version}")
    return Java(executable, major)


def require_utf8_names() -> None:
    """Raise MachineError if Python does not read file names as UTF-8: its names would differ from Java's."""
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        raise MachineError(f"file names are {encoding} in this locale, not UTF-8", hint="set LC_ALL=C.UTF-8, or PYTHONUTF8=1")


@contextmanager
def utf8_for_java() -> Iterator[None]:
    """Make a Java that the block starts read file names as UTF-8. Java uses the locale: with LC_ALL=C it lists only ASCII names."""
    before = os.environ.get("LC_ALL")
    os.environ["LC_ALL"] = "C.UTF-8"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LC_ALL"]
        else:
            os.environ["LC_ALL"] = before


def _major_version(executable: Path) -> int | None:
    try:
        # Java prints its version on stderr.
        done = subprocess.run([executable, "-version"], capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION.search(done.stderr + done.stdout)
    return int(match.group(1)) if match else None


def _unusable(problem: str) -> MachineError:
    home = "; unset JAVA_HOME or point it there" if os.environ.get("JAVA_HOME") else ""
    wanted = " or ".join(str(version) for version in SUPPORTED_JAVA)
    return MachineError(f"{problem}; Spark needs Java {wanted}", hint=f"install it: {INSTALL_JAVA}{home}")
