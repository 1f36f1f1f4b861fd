"""Where a root lies: a local path or an object store's URI, opened with Arrow's file systems."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pyarrow import fs

from spark_jobs.errors import ConfigurationError
from spark_jobs.failure import one_line


@cache
def open_root(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of ``uri`` and the path in it. s3a:// is Hadoop's name for s3://.

    Credentials come from where the store's own tools look for them (environment, profile, instance). Raises ConfigurationError
    where the store does not answer.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), uri
    try:
        filesystem, path = fs.FileSystem.from_uri(uri.replace("s3a://", "s3://", 1))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{uri} cannot be opened: {one_line(error)}") from error
    return filesystem, path


def local_path(uri: str) -> Path | None:
    """The folder of a local root; None for an object store."""
    return Path(uri) if "://" not in uri else None
