"""Define the training step: state, optimizer, balance, and the one function that is compiled.

Dims, in this package's shapes:

    A  microbatches of one update (gradient accumulation)
    R  sequences of one microbatch, over all devices
    S  tokens of a sequence
"""
