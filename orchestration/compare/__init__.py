"""Compares our counts with a third party's report: how much they differ, and why."""

from __future__ import annotations

from orchestration.compare.comparison import Cell, Comparison, Line, compare_report
from orchestration.compare.report import ReportLine, read_report

__all__ = ["Cell", "Comparison", "Line", "ReportLine", "compare_report", "read_report"]
