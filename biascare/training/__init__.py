"""Training: one step, the loop around it, and the engine below it."""
