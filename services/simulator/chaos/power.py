"""A disk whose power can be cut: an ext4 file system on a loop device (needs root), stopped by the kernel in the midst of its work.

The kernel's shutdown request for ext4 drops all that was not written to the disk, as the loss of power does: what was not synced
is gone or empty when the file system is mounted again. Options make it as hostile as it may be: the journal is written by a sync
alone, and a rename does not write a file's data.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import uuid
from pathlib import Path

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_DROP_JOURNAL = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH
_OPTIONS = "loop,commit=300,noauto_da_alloc"
LAYER = "ext4 on a loop device"


class LoopDisk:
    """A mounted file system of ``megabytes`` at ``path``. Use as a context manager. Raises OSError where that is not allowed."""

    def __init__(self, folder: Path, megabytes: int = 1024) -> None:
        self.path = folder / "disk"
        self._folder = folder
        self._megabytes = megabytes
        self._image = folder / f"{uuid.uuid4().hex}.img"

    def __enter__(self) -> LoopDisk:
        self.path.mkdir(parents=True)
        with self._image.open("wb") as image:
            image.truncate(self._megabytes * 1024 * 1024)
        _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(self._image))
        self._mount()
        return self

    def __exit__(self, *_: object) -> None:
        self._unmount()
        self._image.unlink()

    def _mount(self) -> None:
        _run("mount", "-o", _OPTIONS, str(self._image), str(self.path))

    def _unmount(self) -> None:
        _run("umount", "-l", str(self.path))  # lazily: a process may still have a file open

    def sync(self) -> None:
        """Write everything through, as if it had lain there for long."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
                raise OSError(ctypes.get_errno(), "syncfs")
        finally:
            os.close(descriptor)

    def cut(self, *, seconds_later: bool) -> None:
        """Cut the power, and mount what is left.

        ``seconds_later``: after the file system has written its journal by itself: names are on the disk, and files that were not
        synced are empty. Else at once: names that were not synced are gone.
        """
        if seconds_later:
            marker = self.path / ".marker"
            marker.touch()
            descriptor = os.open(marker, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        descriptor = os.open(self.path, os.O_RDONLY)
        fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _DROP_JOURNAL))
        os.close(descriptor)
        left = self._folder / f"{uuid.uuid4().hex}.img"
        _run("cp", "--sparse=always", str(self._image), str(left))  # the old one may be in use until its last file is closed
        self._unmount()
        self._image.unlink()
        self._image = left
        self._mount()


def why_not(folder: Path) -> str | None:
    """Why no such disk can be had here; None: it can."""
    if os.geteuid() != 0:
        return "a loop device needs root"
    if missing := [name for name in ("mkfs.ext4", "mount", "umount") if shutil.which(name) is None]:
        return f"{', '.join(missing)} not found"
    try:
        with LoopDisk(folder / uuid.uuid4().hex, 16) as disk:
            disk.cut(seconds_later=False)
    except OSError as error:
        return str(error)
    return None


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise OSError(f"{' '.join(command[:1])}: {done.stderr.strip()[:200]}")
