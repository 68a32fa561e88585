"""Checkpoints of MaxText: what their tensors are called, what they fill here, and reading them."""
