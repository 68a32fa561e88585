"""Train: join data, program and checkpoints in a loop, record metrics, stop on request."""
