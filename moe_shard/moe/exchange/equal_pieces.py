"""Exchange pieces of equal size: forced balance, where routing is known at tracing time.

Round-robin choices give every expert the same number of token copies if the number of experts
divides that of the choices. Sorting by expert is then a transposition, every peer gets an equal
piece by a plain all-to-all, and equal groups are one batched product: no sort, no counts, no index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moe_shard.moe.placement import EXCHANGED
from moe_shard.moe.score_on_input import scaled_copies
from moe_shard.moe.weights import ExpertWeights

BatchedCompute = Callable[[ExpertWeights, Float[Array, "L C M"]], Float[Array, "L C M"]]
"""Applies the experts of this device, each to equally many token copies."""


@dataclass(frozen=True)
class EqualPieces:
    """Exchange round-robin choices, where the number of experts divides theirs.

    Attributes:
        axes: mesh axes of the expert group; empty where there is nothing to exchange.
        devices: D, devices of the group.
        experts: L, experts of one device.
        compute: applies the experts to [L C M].
        score_on_input: whether combine weights multiply the experts' input.
    """

    axes: tuple[str, ...]
    devices: int
    experts: int
    compute: BatchedCompute
    score_on_input: bool

    def apply(
        self,
        tokens: Float[Array, "T M"],
        combine_weights: Float[Array, "T K"],
        expert_weights: ExpertWeights,
    ) -> Float[Array, "T M"]:
        """Return the weighted sum of each token's experts."""
        count, k = combine_weights.shape
        dim = tokens.shape[1]
        each = count * k // (self.devices * self.experts)  # copies from one device to one expert
        with jax.named_scope("dispatch"):
            if self.score_on_input:
                copies = scaled_copies(tokens, combine_weights)
                combine_weights = jnp.ones_like(combine_weights)
            else:
                copies = _repeated(tokens, k)
            copies = copies.reshape(each, self.devices * self.experts, dim).swapaxes(0, 1)
            copies = self._exchange(copies.reshape(self.devices, self.experts, each, dim))
            copies = checkpoint_name(copies, EXCHANGED).swapaxes(0, 1)
            copies = copies.reshape(self.experts, self.devices * each, dim)
        with jax.named_scope("experts"):
            copies = self.compute(expert_weights, copies)
        with jax.named_scope("combine"):
            copies = copies.reshape(self.experts, self.devices, each, dim).swapaxes(0, 1)
            copies = checkpoint_name(self._exchange(copies), EXCHANGED)
            copies = copies.reshape(self.devices * self.experts, each, dim).swapaxes(0, 1)
            return _sum_in_order(copies.reshape(count, k, dim), combine_weights)

    def _exchange(self, pieces: Float[Array, "D L C M"]) -> Float[Array, "D L C M"]:
        if not self.axes:
            return pieces
        return jax.lax.all_to_all(pieces, self.axes, split_axis=0, concat_axis=0, tiled=True)


def _sum_in_order(y: Float[Array, "T K M"], weights: Float[Array, "T K"]) -> Float[Array, "T M"]:
    """Sum over k in order, weighted, in float32."""
    total = jnp.zeros((), jnp.float32)
    for k in range(weights.shape[1]):
        total = total + weights[:, k, None] * y[:, k].astype(jnp.float32)
    return total.astype(y.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _repeated(tokens: Float[Array, "T M"], k: int) -> Float[Array, "T K M"]:
    """Repeat every token k times; its gradient is summed over k in order, as expert outputs are."""
    return jnp.broadcast_to(tokens[:, None], (tokens.shape[0], k, tokens.shape[1]))


def _repeated_fwd(tokens: Float[Array, "T M"], k: int) -> tuple[Float[Array, "T K M"], None]:
    return _repeated(tokens, k), None


def _repeated_bwd(
    _k: int, _residual: None, gradient: Float[Array, "T K M"]
) -> tuple[Float[Array, "T M"]]:
    return (_sum_in_order(gradient, jnp.ones(gradient.shape[:2], jnp.float32)),)


_repeated.defvjp(_repeated_fwd, _repeated_bwd)
