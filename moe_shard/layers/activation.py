"""What stands between the projections of a gated MLP, dense, shared or of an expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_shard.config.model_config import GatingConfig


def _quick_gelu(x: Float[Array, "*R F"]) -> Float[Array, "*R F"]:
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=True),
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
}
"""The gate's nonlinearity, by its name in `mlp_activations`."""


def gated(
    gate: Float[Array, "*R F"], up: Float[Array, "*R F"], gating: GatingConfig
) -> Float[Array, "*R F"]:
    """`act(gate) * (up + offset)`, both clamped first where there is a limit (arXiv 2002.05202).

    Args:
        gate: output of the gate's projection, its bias added.
        up: output of the other inward projection, likewise.
        gating: activation, limit, offset.
    """
    if gating.mlp_activations_limit != -1:
        gate = jnp.minimum(gate, gating.mlp_activations_limit)
        up = jnp.clip(up, -gating.mlp_activations_limit, gating.mlp_activations_limit)
    if gating.mlp_linear_offset != 0:
        up = up + gating.mlp_linear_offset
    return ACTIVATIONS[gating.activation](gate) * up
