"""Training: data, optimizer, step, checkpoint, metrics, and the loop that joins them.

Dims, in this package's shapes:

    A  microbatches of one update (gradient accumulation)
    R  rows (sequences) of one microbatch, over all devices
    S  tokens of a row
"""
