"""Worked examples on data that others made."""
