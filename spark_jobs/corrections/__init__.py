"""Corrections: what a repair, a backfill or a review changes in the tables, decided first and written ahead."""
