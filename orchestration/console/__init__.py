"""The console: web pages over the published marts and the live increments. It only reads."""

QUALITY = "quality"
"""Where the console serves the data docs: the first part of their addresses."""
