"""Activate the gate and up projections of an MLP, be it dense, shared or an expert's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_shard.config.model_config import GatingConfig


def _quick_gelu(x: Float[Array, "*R F"]) -> Float[Array, "*R F"]:
    return x * jax.nn.sigmoid(1.702 * x)


def _relu2(x: Float[Array, "*R F"]) -> Float[Array, "*R F"]:
    positive = jax.nn.relu(x)
    return positive * positive


ACTIVATIONS: dict[str, Callable[[Float[Array, "*R F"]], Float[Array, "*R F"]]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=True),
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu2": _relu2,
}
"""Name in `mlp_activations` -> nonlinearity of the gate."""


def activated(inward: Sequence[Float[Array, "*R F"]], gating: GatingConfig) -> Float[Array, "*R F"]:
    """Compute the hidden activations from gate and up, or without a gate from up alone.

    Args:
        inward: outputs of the projections, with their biases.
        gating: activation, limit, offset.
    """
    if gating.has_gate:
        gate, up = inward
        return gated(gate, up, gating)
    (up,) = inward
    return ACTIVATIONS[gating.activation](up)


def gated(
    gate: Float[Array, "*R F"], up: Float[Array, "*R F"], gating: GatingConfig
) -> Float[Array, "*R F"]:
    """Compute `act(gate) * (up + offset)`, both clamped first if there is a limit.

    Source: arXiv 2002.05202; limit and offset as in GPT-OSS (arXiv 2508.10925).

    Args:
        gate: output of the gate projection, with its bias.
        up: output of the up projection, with its bias.
        gating: activation, limit, offset.
    """
    if gating.mlp_activations_limit != -1:
        gate = jnp.minimum(gate, gating.mlp_activations_limit)
        up = jnp.clip(up, -gating.mlp_activations_limit, gating.mlp_activations_limit)
    if gating.mlp_linear_offset != 0:
        up = up + gating.mlp_linear_offset
    return ACTIVATIONS[gating.activation](gate) * up
