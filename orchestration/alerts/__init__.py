"""Alerts: the notifiers that send them, and the Dagster sensors that raise them."""
