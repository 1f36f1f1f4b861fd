"""Pure functions from columns to columns: no file, no table."""
