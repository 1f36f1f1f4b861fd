"""Where a root lies: a local path or an object store's URI, opened with Arrow's file systems."""

from __future__ import annotations

from pyarrow import fs


def open_root(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of ``uri`` and the path in it. s3a:// is Hadoop's name for s3://.

    Credentials come from where the store's own tools look for them (environment, profile, instance).
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), uri
    filesystem, path = fs.FileSystem.from_uri(uri.replace("s3a://", "s3://", 1))
    return filesystem, path
