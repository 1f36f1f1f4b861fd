"""Dagster assets: thin, each one call into the packages that do the work."""
