"""Publishing: what Delta versions add, as Kafka messages, each version once. docs/publishing.md has the messages."""
