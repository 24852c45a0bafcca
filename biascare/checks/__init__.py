"""Checks before training: rows, columns, leaks between folders."""
