"""From finished cases to everything that an audit states, as numbers."""
