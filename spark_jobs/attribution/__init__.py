"""Attribution of orders to touches: pure functions on Arrow and Spark DataFrames, and the index of an order's touches."""

from spark_jobs.attribution.frames import attribute, credit_orders

__all__ = ["attribute", "credit_orders"]
