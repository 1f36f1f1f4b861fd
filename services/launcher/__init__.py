"""Starts and stops real Kafka, Pinot and S3 here, from files that are pinned. Trials and tests use it; nothing needs it."""
