"""A budget service: an example of a consumer of `ads-metrics` that is exactly-once by keys and by its own transaction.

It knows Kafka and SQLite, and the messages of docs/publishing.md; nothing of the lakehouse.
"""
