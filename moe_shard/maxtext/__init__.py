"""Read MaxText's checkpoints."""
