"""Order tokens so that devices that share sequences have equal work under a causal mask.

In the order of the text, the last device of a context axis attends to everything and the first to
its own tokens only. Here each device has an early chunk and a late one, as in MaxText (and Llama 3,
arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from moe_shard.config.model_config import ModelConfig
from moe_shard.config.moe_config import MoEConfig
from moe_shard.config.strategies import find_strategy
from moe_shard.sharding.annotate import Sharding


class TokenOrder(NamedTuple):
    """Say in which order the tokens of a sequence are processed, and why.

    Attributes:
        order: for each place, the index of its token in the text; None for the order of the text.
        reason: a clause for a printed record; empty where the question does not arise.
    """

    order: Int[np.ndarray, "S"] | None
    reason: str


def order_tokens(config: ModelConfig, sharding: Sharding, tokens: int) -> TokenOrder:
    """Choose the order of the tokens of every sequence.

    Args:
        config: the model.
        sharding: the mesh and its rules.
        tokens: S.
    """
    parts = 1
    for axis in sharding.spec("tokens", ("activation_length",), (tokens,)):
        for name in (axis,) if isinstance(axis, str) else axis or ():
            parts *= sharding.mesh.shape[name]
    if parts == 1:
        return TokenOrder(None, "")
    attention = config.attention
    if not attention.context_parallel_load_balance:
        return TokenOrder(None, "context_parallel_load_balance=false")
    if "global" not in attention.attention_pattern:
        return TokenOrder(None, "every token has the work of its window")
    if why := _drops_by_position(config.moe):
        return TokenOrder(None, f"{why}, so another order would drop other tokens")
    if tokens % (2 * parts):
        return TokenOrder(None, f"{tokens} tokens do not make {2 * parts} equal chunks")
    return TokenOrder(zigzag(tokens, parts), "an early and a late chunk on each device")


def zigzag(tokens: int, parts: int) -> Int[np.ndarray, "S"]:
    """Return the order in which each part has a chunk and its mirror image from the end.

    >>> zigzag(8, 2).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    """
    chunks = np.arange(tokens, dtype=np.int32).reshape(2 * parts, -1)
    return np.concatenate([chunks[part] for one in range(parts) for part in (one, -1 - one)])


def _drops_by_position(moe: MoEConfig | None) -> str:
    """Return why tokens may be dropped by their place in the sequence; empty where they are not."""
    if moe is None:
        return ""
    entry = find_strategy(moe.moe_dispatch)
    if entry.has_slots and moe.capacity_factor > 0 and moe.drop_policy == "position":
        return f"capacity_factor={moe.capacity_factor:g} drops by position"
    if "ragged_buffer_factor" in entry.own_keys and moe.ragged_buffer_factor != -1:
        return f"ragged_buffer_factor={moe.ragged_buffer_factor:g} drops by position"
    return ""
