"""Data quality: Great Expectations suites over the Delta tables. Imports neither Dagster nor the Spark jobs."""
