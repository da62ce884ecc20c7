"""The training loop, its set-up, and what watches it."""
