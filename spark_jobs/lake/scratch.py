"""Makes folders for temporary files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from spark_jobs.config import Settings


@contextmanager
def scratch_folder(settings: Settings, prefix: str) -> Iterator[Path]:
    """Create a folder for temporary files, deleted at the end; among the system's if the home is not writable."""
    place = None
    with suppress(OSError):
        settings.scratch_path.mkdir(parents=True, exist_ok=True)
        place = settings.scratch_path if os.access(settings.scratch_path, os.W_OK) else None
    with TemporaryDirectory(prefix=prefix, dir=place) as folder:
        yield Path(folder)
