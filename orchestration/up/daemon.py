"""Dagster's daemon, which burns less CPU while nothing happens: ``python -m orchestration.up.daemon``, with its own arguments."""

from __future__ import annotations

from dagster._daemon import controller
from dagster._daemon.cli import main
from dagster._grpc import server_watcher

from orchestration.up.services import WATCH_SECONDS

# Each reload reads and parses all definitions. It is not needed: the watcher notices when the code server has new ones.
controller.RELOAD_WORKSPACE_INTERVAL = 24 * 3600
server_watcher.WATCH_INTERVAL = WATCH_SECONDS

if __name__ == "__main__":
    main()
