"""Spark's daemon that forks the Python workers of the tasks: ``spark.python.daemon.module``. Its workers load no pandas."""

from __future__ import annotations

from spark_jobs.no_pandas import hide_pandas

if __name__ == "__main__":
    hide_pandas()
    from pyspark.daemon import manager

    manager()
