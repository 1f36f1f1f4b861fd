"""Ingest: landing files and Kafka topics into Delta tables, each record once."""
