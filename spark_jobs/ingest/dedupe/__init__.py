"""Finding duplicates and conflicts: narrow keys only."""
