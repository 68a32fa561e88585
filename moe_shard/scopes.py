"""Name the stages of a model: the `jax.named_scope`s that reports look for.

Scopes are labels only: roles and verdicts do not depend on them, with one private exception.
"""

from __future__ import annotations

MOE_SCOPES = ("router", "dispatch", "experts", "combine")
"""The stages of an MoE layer."""

SCOPES = (
    *(*MOE_SCOPES, "attention", "token_mixer", "mlp"),
    *("embedding", "logits", "loss", "optimizer"),
)
"""All stages that a report names."""

FURTHER_ROUNDS = "moe_shard-further_rounds-6e1f0b9c"
"""Private: the scope of the loops of ragged dispatch that run only where routing exceeds what the
first exchange holds. Reports do not count the collectives in them, and warn about that. No other
scope has this name by chance."""
