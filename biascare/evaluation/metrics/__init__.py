"""Cases to numbers."""
