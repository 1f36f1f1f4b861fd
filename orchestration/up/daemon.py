"""Dagster's daemon, which burns less CPU while nothing happens: ``python -m orchestration.up.daemon``, with its own arguments."""

from __future__ import annotations

from dagster._daemon import controller
from dagster._daemon.cli import main

# Each reload reads and parses all definitions. A watch of the code server, which asks for its id every second, notices new ones.
controller.RELOAD_WORKSPACE_INTERVAL = 24 * 3600

if __name__ == "__main__":
    main()
