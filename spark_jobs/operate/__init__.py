"""Operation: which hours are closed, compaction, vacuum, status, health, and the check of all files."""
