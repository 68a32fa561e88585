"""Compute the experts' gated MLPs with gate, up and their activation as one grouped product.

A routine that reads a block of rows once for gate and up, and applies the activation before it
writes, moves fewer bytes than two products and an activation: without gradients the outputs of gate
and up are never written, and with gradients they are written, but not read again in the forward
pass. Backward, the two gradients of the rows are added up before they are written.

The second product, down, is part of the same derivative, so that the hidden activations need not be
kept for it: they are computed again from the outputs of gate and up, in the loop over elements that
reads these for their gradients anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_shard.config.model_config import GatingConfig
from moe_shard.layers.activation import gated
from moe_shard.moe.grouped.biases import of_groups
from moe_shard.moe.grouped.blocks import Routine


class GatedRoutine(Routine, Protocol):
    """Compute gate, up and their activation together. Hashable: equal routines are one program."""

    def gated(
        self,
        x: Float[Array, "N A"],
        gate: Float[Array, "G A P"],
        up: Float[Array, "G A P"],
        biases: Sequence[Float[Array, "G P"]],
        group_sizes: Int[Array, "G"],
        *,
        gating: GatingConfig,
        keep: bool,
    ) -> tuple[Float[Array, "N P"], ...]:
        """Compute the activation of gate and up, and with `keep` return their outputs after it.

        The activation is computed from float32 sums. Rows past the groups give 0.
        """
        ...

    def gated_dx(
        self,
        by_gate: Float[Array, "N P"],
        by_up: Float[Array, "N P"],
        gate: Float[Array, "G A P"],
        up: Float[Array, "G A P"],
        group_sizes: Int[Array, "G"],
    ) -> Float[Array, "N A"]:
        """Add up the gradients of the rows by gate and by up."""
        ...


class GroupedMLP(NamedTuple):
    """Hold the weights of the groups' MLPs, and the biases of gate and up, if there are any.

    All vary over the same mesh axes as the rows and their groups' sizes; `vary_alike` sums
    gradients over axes that they did not vary over.
    """

    gate: Float[Array, "G A P"]
    up: Float[Array, "G A P"]
    down: Float[Array, "G P A"]
    biases: tuple[Float[Array, "G P"], ...]


_Residuals = tuple[
    Float[Array, "N A"], GroupedMLP, Int[Array, "G"], Float[Array, "N P"], Float[Array, "N P"]
]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def fused_mlp(
    x: Float[Array, "N A"],
    weights: GroupedMLP,
    group_sizes: Int[Array, "G"],
    routine: GatedRoutine,
    gating: GatingConfig,
) -> Float[Array, "N A"]:
    """Apply each group's MLP to its rows by a routine, with gradients by the same routine.

    Args:
        x: rows, those of a group one after another.
        weights: of the groups.
        group_sizes: rows of each group.
        routine: computes the products.
        gating: activation, clamps and offset.
    """
    gate, up, down, biases = weights
    (hidden,) = routine.gated(x, gate, up, biases, group_sizes, gating=gating, keep=False)
    return routine.multiply(hidden, down, group_sizes, transposed=False)


def _forward(
    x: Float[Array, "N A"],
    weights: GroupedMLP,
    group_sizes: Int[Array, "G"],
    routine: GatedRoutine,
    gating: GatingConfig,
) -> tuple[Float[Array, "N A"], _Residuals]:
    gate, up, down, biases = weights
    hidden, of_gate, of_up = routine.gated(
        x, gate, up, biases, group_sizes, gating=gating, keep=True
    )
    # Named here, where a remat policy can see them: MaxText's names.
    of_gate = checkpoint_name(of_gate, "moe_mlpwi_0")
    of_up = checkpoint_name(of_up, "moe_mlpwi_1")
    y = routine.multiply(hidden, down, group_sizes, transposed=False)
    return y, (x, weights, group_sizes, of_gate, of_up)


def _backward(
    routine: GatedRoutine, gating: GatingConfig, residuals: _Residuals, dy: Float[Array, "N A"]
) -> tuple[Float[Array, "N A"], GroupedMLP, None]:
    x, (gate, up, down, biases), group_sizes, of_gate, of_up = residuals
    by_hidden = routine.multiply(dy, down, group_sizes, transposed=True)
    wide = (each.astype(jnp.float32) for each in (of_gate, of_up))
    hidden, pullback = jax.vjp(lambda gate, up: gated(gate, up, gating), *wide)
    by_gate, by_up = (each.astype(x.dtype) for each in pullback(by_hidden.astype(jnp.float32)))
    by_biases = tuple(
        _sum_rows(by, bias, group_sizes) for by, bias in zip((by_gate, by_up), biases, strict=False)
    )
    by_weights = GroupedMLP(
        routine.outer(x, by_gate, group_sizes),
        routine.outer(x, by_up, group_sizes),
        routine.outer(hidden.astype(x.dtype), dy, group_sizes),
        by_biases,
    )
    return routine.gated_dx(by_gate, by_up, gate, up, group_sizes), by_weights, None


fused_mlp.defvjp(_forward, _backward)


def _sum_rows(
    rows: Float[Array, "N P"], bias: Float[Array, "G P"], group_sizes: Int[Array, "G"]
) -> Float[Array, "G P"]:
    """Sum the rows of each group: the gradient of its bias."""
    expand = partial(of_groups, group_sizes=group_sizes, rows=rows.shape[0])
    by_bias: Float[Array, "G P"] = jax.linear_transpose(expand, bias)(rows)[0]
    return by_bias
