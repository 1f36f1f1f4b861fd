"""``adtally up``: Dagster and the continuous ingest on one machine, kept running and ended together."""
