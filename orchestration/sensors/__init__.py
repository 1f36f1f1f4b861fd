"""Dagster sensors: what the stream committed, and which hours closed."""
