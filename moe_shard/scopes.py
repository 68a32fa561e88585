"""Name the stages of a model: the `jax.named_scope`s that reports look for.

Scopes label; they decide nothing about roles and verdicts. The one exception is private.
"""

from __future__ import annotations

MOE_SCOPES = ("router", "dispatch", "experts", "combine")
"""The stages of an MoE layer."""

SCOPES = (*MOE_SCOPES, "attention", "mlp", "embedding", "logits", "loss", "optimizer")
"""All stages that a report names."""

FURTHER_ROUNDS = "moe_shard-further_rounds-6e1f0b9c"
"""Private: of the loops of ragged dispatch that run only where a router exceeds what the first
exchange holds. Reports pass over the collectives in them, and say so. It is no name that anybody
gives to a scope of their own."""
