"""Billing: the ledger of charges, credits and adjustments."""
