"""Data quality: Great Expectations suites over the Delta tables and the marts. Imports neither Dagster nor the Spark jobs.

``validate_hour`` and ``validate_marts`` validate the suites in ``suites/`` and write the data docs to a folder.
"""

import expectations._gx  # noqa: F401 - first
from expectations.docs import DataDocs
from expectations.errors import ExpectationsError
from expectations.results import CheckOutcome, HourValidation, Severity
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
