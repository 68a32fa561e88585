"""Random tokens instead of text: one batch, the same in every step, as MaxText's synthetic data.

For measuring a step without a corpus. A loss that falls on it is a model learning one batch by
heart. Each row is whole: no document ends in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

HostBatch = dict[str, Int32[np.ndarray, "a r S"]]


class SyntheticSteps:
    """The parts of the one batch that this process holds, without end.

    Args:
        held_a: numbers of the microbatches.
        held_r: numbers of a microbatch's rows.
        rows: R, of a microbatch over all devices.
        seq_len: S.
        vocab_size: V; every token is as likely as any other.
        seed: of the tokens.
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
        """Do nothing: nothing is being read."""


def synthetic_tokens(
    rows: np.ndarray, count: int, *, vocab_size: int, seed: int
) -> Int32[np.ndarray, "..."]:
    """The tokens of rows: hashes of seed, row and place (SplitMix64), scaled to the vocabulary.

    Not NumPy's own streams, which may change with its version, and no state: a row is the same
    whoever makes it.

    Args:
        rows: their numbers.
        count: tokens of each.
        vocab_size: V.
        seed: in [0, 2**32).
    """
    row = rows.astype(np.uint64)[..., None]
    place = np.arange(count, dtype=np.uint64)
    start = np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)  # of scalars NumPy reports an overflow
    bits = (row << np.uint64(32)) + place + start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    bits = (bits ^ (bits >> np.uint64(31))) >> np.uint64(32)
    return ((bits * np.uint64(vocab_size)) >> np.uint64(32)).astype(np.int32)
