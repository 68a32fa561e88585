"""Turn files of text into batches of tokens, the same on every machine for the same seed."""
