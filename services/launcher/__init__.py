"""Starts and stops real Kafka and Pinot on this machine, from jars that are pinned. Trials and tests use it; nothing needs it."""
