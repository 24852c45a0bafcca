"""Evaluation: inference writes one row per item, everything else reads rows."""
