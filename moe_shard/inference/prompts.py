"""Pad prompts of different lengths to one array."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from moe_shard.config import Config

TEXT_SEGMENT = 1
"""Segment of a prompt; no token of it attends to the padding before it, whose segment is 0."""


class Padded(NamedTuple):
    """Hold prompts padded on the left, so that they end together.

    Attributes:
        tokens: ids; 0 in the padding.
        positions: positions from 0 at a prompt's first token; 0 before it.
        segment_ids: `TEXT_SEGMENT`, or 0 before a prompt.
    """

    tokens: Int32[np.ndarray, "B S"]
    positions: Int32[np.ndarray, "B S"]
    segment_ids: Int32[np.ndarray, "B S"]

    @property
    def lengths(self) -> Int32[np.ndarray, "B"]:
        """Count the tokens of each prompt."""
        return np.count_nonzero(self.segment_ids == TEXT_SEGMENT, axis=1).astype(np.int32)


def pad_left(prompts: Sequence[Sequence[int]], *, rows: int) -> Padded:
    """Pad prompts on the left to the length of the longest.

    Args:
        prompts: token ids, at least one per prompt.
        rows: B, at least the number of prompts, which are repeated to fill the batch.
    """
    places = max(map(len, prompts))
    padded = Padded(*(np.zeros((rows, places), np.int32) for _ in Padded._fields))
    for row in range(rows):
        prompt = prompts[row % len(prompts)]
        text = slice(places - len(prompt), places)
        padded.tokens[row, text] = prompt
        padded.positions[row, text] = np.arange(len(prompt))
        padded.segment_ids[row, text] = TEXT_SEGMENT
    return padded


def rows_for(config: Config, sizes: Mapping[str, int], prompts: int) -> int:
    """Round the number of prompts up to a batch size that the batch axes of a mesh divide.

    Args:
        config: provides the rule table.
        sizes: mesh axis -> size.
        prompts: number of prompts.
    """
    names = ("activation_batch", "activation_batch_moe", "activation_batch_no_exp")
    parts = (math.prod(sizes[axis] for axis in config.mesh.axes_of(name)) for name in names)
    whole = math.lcm(*parts)
    return -(-prompts // whole) * whole
