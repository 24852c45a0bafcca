"""The human in the loop: simulated experts for training and evaluation, real ones in a session."""
