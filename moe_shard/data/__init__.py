"""Data: from files of text to batches of tokens, the same on every machine for the same seed."""
