"""Alerts: who is told, and the Dagster sensors that tell."""
