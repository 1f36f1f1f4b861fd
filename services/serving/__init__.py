"""What is served from Pinot: its tables over the published topics, and the named queries that dashboards ask."""
