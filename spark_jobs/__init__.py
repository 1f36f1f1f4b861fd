"""Spark and Delta jobs of adtally: no orchestrator in here."""
