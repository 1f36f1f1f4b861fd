"""File permissions."""

from __future__ import annotations

import os


def keep_files_private() -> None:
    """Let only the user read what this process and its children write: tables and indexes hold the ids of users."""
    os.umask(0o077)
