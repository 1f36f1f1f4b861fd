"""Data quality: Great Expectations suites over the Delta tables and the marts. Imports neither Dagster nor the Spark jobs.

``validate_hour`` and ``validate_marts`` judge, each check being data (``suites/``); the data docs lie where they are told.
"""

import expectations._gx  # noqa: F401 - first
from expectations.checks import Severity
from expectations.docs import DataDocs
from expectations.errors import ExpectationsError
from expectations.results import CheckOutcome, HourValidation
from expectations.suites import MARTS, SUITES
from expectations.validate import related_tables, validate_hour, validate_marts

__all__ = [
    "MARTS",
    "SUITES",
    "CheckOutcome",
    "DataDocs",
    "ExpectationsError",
    "HourValidation",
    "Severity",
    "related_tables",
    "validate_hour",
    "validate_marts",
]
