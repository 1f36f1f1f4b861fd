"""Opens a root, a local path or an object store's URI, with Arrow's file systems."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pyarrow import fs

from spark_jobs.config import Settings
from spark_jobs.errors import ConfigurationError, UsageError
from spark_jobs.failure import one_line


def is_local(uri: str) -> bool:
    """Return whether a root is a local path, not an object store's URI."""
    return "://" not in uri


@cache
def open_root(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of ``uri`` and the path in it. s3a:// is Hadoop's name for s3://.

    Credentials come from environment, profile or instance. Raises ConfigurationError if the store does not answer.
    """
    if is_local(uri):
        return fs.LocalFileSystem(), uri
    try:
        filesystem, path = fs.FileSystem.from_uri(uri.replace("s3a://", "s3://", 1))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{uri} cannot be opened: {one_line(error)}") from error
    return filesystem, path


def local_path(uri: str) -> Path | None:
    """Return the folder of a local root; None for an object store."""
    return Path(uri) if is_local(uri) else None


def require_local(settings: Settings, what: str) -> None:
    """Raise UsageError if the lakehouse is not on a local path. ``what`` names the command that needs one."""
    if local_path(settings.lakehouse_uri) is None:
        raise UsageError(
            f"{what} needs a lakehouse on a local path, not {settings.lakehouse_uri}", hint="set ADTALLY_LAKEHOUSE to a path"
        )
