"""Kafka: which clusters there are, and how records of a topic are read by offsets."""
