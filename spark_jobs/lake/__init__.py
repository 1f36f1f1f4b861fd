"""The lake: the only code that opens, reads, pins, scans and commits Delta tables, and that takes locks."""
