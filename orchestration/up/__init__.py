"""``adtally up``: Dagster, the continuous ingest and the builds of the marts on one machine, kept running and ended together."""
