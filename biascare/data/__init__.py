"""Prepared records, and their way to a batch."""
