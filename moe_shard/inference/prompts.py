"""Prompts of different lengths as one array."""

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
    """Prompts that end together.

    Attributes:
        tokens: 0 where there is none.
        positions: from 0 at a prompt's first token; 0 before it.
        segment_ids: `TEXT_SEGMENT`, or 0 before a prompt.
    """

    tokens: Int32[np.ndarray, "B S"]
    positions: Int32[np.ndarray, "B S"]
    segment_ids: Int32[np.ndarray, "B S"]

    @property
    def lengths(self) -> Int32[np.ndarray, "B"]:
        """Tokens of each prompt."""
        return np.count_nonzero(self.segment_ids == TEXT_SEGMENT, axis=1).astype(np.int32)


def pad_left(prompts: Sequence[Sequence[int]], *, rows: int) -> Padded:
    """Prompts padded on the left to the longest.

    Args:
        prompts: tokens, at least one each.
        rows: B, at least as many; the prompts are repeated to fill them.
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
    """Rows that hold some prompts and that the batch axes of a mesh divide.

    Args:
        config: the rule table.
        sizes: mesh axis -> size.
        prompts: how many.
    """
    names = ("activation_batch", "activation_batch_moe", "activation_batch_no_exp")
    parts = (math.prod(sizes[axis] for axis in config.mesh.axes_of(name)) for name in names)
    whole = math.lcm(*parts)
    return -(-prompts // whole) * whole
