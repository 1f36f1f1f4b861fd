"""Tells a path of this machine from an object store's URI, and gives each location one spelling. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from pathlib import Path

# delta-rs takes paths as parts of URIs: it reads these characters as another path, or panics.
_UNUSABLE = re.compile(r"[\[\]\\|^%\x00-\x1f\x7f]")


def is_local(uri: str) -> bool:
    """Return whether a location is a path of this machine, not an object store's URI."""
    return "://" not in uri


def canonical_path(path: Path) -> Path:
    """Return the one spelling of a path. Spark, Java and the tables compare paths as text: two spellings would be two files."""
    return Path(os.path.realpath(path.expanduser()))


def canonical(location: str | Path) -> str:
    """Return the one spelling of a location: an absolute path, or a URI without a last slash, ``s3a://`` as ``s3://``."""
    if isinstance(location, Path) or is_local(location):
        return str(canonical_path(Path(location)))
    scheme, _, rest = location.partition("://")
    return f"{'s3' if scheme == 's3a' else scheme}://{rest.rstrip('/')}"


def local_path(uri: str) -> Path | None:
    """Return the path of a location of this machine; None for an object store."""
    return Path(uri) if is_local(uri) else None


def local_folder(location: str, otherwise: Path) -> Path:
    """Return the folder of a location of this machine; ``otherwise`` of an object store."""
    return Path(location) if is_local(location) else otherwise


def state_root(home: Path, lakehouse: str) -> str:
    """Return where state lives that is no table and cannot be rebuilt: the home, or a folder of a lakehouse in an object store."""
    return str(home) if is_local(lakehouse) else f"{lakehouse}/_adtally"


def unusable_character(location: str) -> str | None:
    """Return a character of a path with which no table can be opened; None if there is none, and for a URI."""
    found = _UNUSABLE.search(location) if is_local(location) else None
    return None if found is None else found[0]
