"""Gives dbt's connections what `spark_jobs.lake.duck` gives all others: the extensions, and the credentials of an object store.

dbt-duckdb imports it, as profiles.yml says. So no credential passes through a file, an argument or a log of dbt.
"""

from __future__ import annotations

from typing import Any

from dbt.adapters.duckdb.plugins import BasePlugin
from duckdb import DuckDBPyConnection

from spark_jobs.lake.duck import delta_config, load_delta


class Plugin(BasePlugin):
    """The name under which dbt-duckdb looks for it. Its configuration has one entry, ``lakehouse``."""

    def initialize(self, plugin_config: dict[str, Any]) -> None:
        """Take the lakehouse from the profile."""
        self._lakehouse = str(plugin_config["lakehouse"])

    def update_connection_config(self, creds: object, config: dict[str, Any]) -> None:
        """Add the options that the extensions need."""
        config.update(delta_config(self._lakehouse))

    def configure_connection(self, conn: DuckDBPyConnection) -> None:
        """Load the extensions, and set the credentials."""
        load_delta(conn, self._lakehouse)
