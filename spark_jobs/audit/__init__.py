"""The recount: the landing files read again by code that shares nothing with the ingest."""
