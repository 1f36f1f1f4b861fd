"""Pinot's tables over the published topics, and the named queries of dashboards."""
