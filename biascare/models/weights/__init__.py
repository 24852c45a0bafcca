"""Weights of other projects: recognised, renamed, loaded, reported."""
