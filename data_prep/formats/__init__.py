"""Careful readers of foreign file formats."""
