"""Training: the loop that joins data, program and checkpoints, its metrics, and how it ends."""
