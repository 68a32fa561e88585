"""Compute capacities: how many slots an expert has, and what a strategy brings to the experts.

Sources: GShard (arXiv 2006.16668); MaxText for the capacity of a sequence.
"""

from __future__ import annotations

import math

from moe_shard.config.moe_config import CapacityRule, MoEConfig
from moe_shard.config.strategies import find_strategy


def expert_capacity(
    *,
    tokens: int,
    num_experts: int,
    k: int,
    factor: float,
    rule: CapacityRule = "maxtext",
    minimum: int = 0,
) -> int:
    """Return the number of slots that an expert has for one sequence.

    Args:
        tokens: S, tokens of the sequence.
        num_experts: E, experts of the layer.
        k: K, experts per token.
        factor: slots over those of a perfectly balanced load. 0 or less: as many slots as the
            sequence has tokens, which drops nothing, since a token chooses an expert at most once.
        rule: "maxtext": int(max(ceil(S*k/E) * factor, factor)); "gshard": ceil(S/E * factor * k).
        minimum: fewest slots to return (GShard's `min_capacity`).
    """
    if factor <= 0:
        return tokens
    if rule == "maxtext":
        slots = int(max(math.ceil(tokens * k / num_experts) * factor, factor))
    else:
        slots = math.ceil(tokens * factor * k / num_experts)
    return max(slots, minimum)


def sequence_capacity(config: MoEConfig, *, tokens: int) -> int:
    """Return C, the slots that a layer gives an expert for one sequence of this many tokens.

    At most `tokens`: more could never be filled.
    """
    slots = expert_capacity(
        tokens=tokens,
        num_experts=config.num_experts,
        k=config.num_experts_per_tok,
        factor=config.capacity_factor,
        rule=config.capacity_rule,
        minimum=config.min_capacity,
    )
    return min(slots, tokens)


def copies_per_sequence(config: MoEConfig, *, tokens: int) -> int:
    """Return how many token copies the strategy brings to all experts together for one sequence.

    The strategy's entry gives the number; by default it is one copy for each slot, or for each
    choice where there are no slots.
    """
    entry = find_strategy(config.moe_dispatch)
    if entry.copies is not None:
        return entry.copies(config, tokens)
    if entry.has_slots:
        return config.num_experts * sequence_capacity(config, tokens=tokens)
    return tokens * config.num_experts_per_tok
