"""The composition root: a configuration becomes objects."""
