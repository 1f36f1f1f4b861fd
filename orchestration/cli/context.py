"""The global options of one call of ``adtally``, and the settings of the installation that they name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from spark_jobs.errors import UsageError

if TYPE_CHECKING:
    from spark_jobs.config import Settings


@dataclass
class Call:
    """The global options. The root command sets them in the context, where every other command finds them.

    ``owns_process``: the process ends with the command, so the command may change what concerns all of it.
    """

    debug: bool = False
    home: Path | None = None
    owns_process: bool = False


def settings_of(context: typer.Context) -> Settings:
    """Return the settings of the chosen installation. Raises UsageError if its home cannot be a folder."""
    from orchestration.cli.doctor import nearest
    from spark_jobs.config import load_settings

    settings = load_settings(home=context.ensure_object(Call).home)
    place = nearest(settings.home_path)
    if not place.is_dir():
        raise UsageError(f"{place} is not a folder", hint="set ADTALLY_HOME or --home to one, which may be new")
    return settings
