"""Who may read what this project writes."""

from __future__ import annotations

import os


def keep_files_private() -> None:
    """Let what this process makes, and those it starts, be for its user alone: tables and indexes hold the ids of users."""
    os.umask(0o077)
