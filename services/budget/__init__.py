"""A budget service: an example consumer of `ads-metrics`, exactly-once by keys and by its own transaction.

It uses Kafka, SQLite and the messages of docs/publishing.md, and nothing of the lakehouse.
"""
