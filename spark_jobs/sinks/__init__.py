"""Writing Delta tables: created as the registry says, appended to once per transaction."""
