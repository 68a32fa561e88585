"""Make one random batch, the same in every step, as MaxText's synthetic data does.

It serves to measure a step without a corpus. A falling loss means that the model memorises the
batch. Each sequence is one document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Integer

HostBatch = dict[str, Int32[np.ndarray, "a r S"]]


class SyntheticSteps:
    """Repeat this process's part of the one batch, without end.

    Args:
        held_a: numbers of this process's microbatches.
        held_r: numbers of its sequences within a microbatch.
        rows: R, sequences of a microbatch over all devices.
        seq_len: S, tokens in a sequence.
        vocab_size: V; tokens are uniformly distributed.
        seed: seed of the tokens.
    """

    def __init__(
        self,
        held_a: Sequence[int],
        held_r: Sequence[int],
        *,
        rows: int,
        seq_len: int,
        vocab_size: int,
        seed: int,
    ) -> None:
        numbers = np.array([[a * rows + r for r in held_r] for a in held_a], np.uint64)
        tokens = synthetic_tokens(numbers, seq_len + 1, vocab_size=vocab_size, seed=seed)
        place = np.arange(seq_len, dtype=np.int32)
        shape = (*numbers.shape, seq_len)
        self._batch: HostBatch = {
            "inputs": tokens[..., :-1],
            "targets": tokens[..., 1:],
            "positions": np.broadcast_to(place, shape),
            "segment_ids": np.ones(shape, np.int32),
        }

    def __next__(self) -> HostBatch:
        return self._batch

    def close(self) -> None:
        """Do nothing: there is nothing to stop."""


def synthetic_tokens(
    rows: Integer[np.ndarray, "*B"], count: int, *, vocab_size: int, seed: int
) -> Int32[np.ndarray, "*B {count}"]:
    """Hash seed, sequence number and place (SplitMix64) into tokens of the vocabulary.

    A hash has no state, and no version as NumPy's random streams do: a sequence is the same
    whichever process makes it.

    Args:
        rows: numbers of the sequences.
        count: tokens of each.
        vocab_size: V.
        seed: a seed in [0, 2**32).
    """
    row = rows.astype(np.uint64)[..., None]
    place = np.arange(count, dtype=np.uint64)
    start = np.uint64(
        seed * 0x9E3779B97F4A7C15 % 2**64
    )  # in Python: NumPy warns of an overflow of scalars
    bits = (row << np.uint64(32)) + place + start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    bits = (bits ^ (bits >> np.uint64(31))) >> np.uint64(32)
    return ((bits * np.uint64(vocab_size)) >> np.uint64(32)).astype(np.int32)
