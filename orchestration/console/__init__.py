"""The console: web pages over the published marts and the live increments. It only reads."""
