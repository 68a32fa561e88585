"""Forced balance: the routing is known when the program is traced, so nothing is left to find out.

Round-robin choices give every expert the same number of rows wherever the experts divide them.
Sorting by expert is then a transposition, every peer gets an equal piece by a plain all-to-all,
and equal groups are one batched product: no sort, no counts, no index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moe_shard.moe.dispatch.weighing import weighed
from moe_shard.moe.placement import EXCHANGED
from moe_shard.moe.weights import ExpertWeights

BatchedCompute = Callable[[ExpertWeights, Float[Array, "L C M"]], Float[Array, "L C M"]]
"""The experts of this device, each on as many rows as the others."""


@dataclass(frozen=True)
class EqualPieces:
    """The route of choices that are dealt out in turn to experts whose number divides theirs.

    Attributes:
        axes: mesh axes of the expert group; empty where there is nothing to exchange.
        devices: D, devices of the group.
        experts: L, experts of one device.
        compute: applies the experts to [L C M].
        score_on_input: weights are on what experts take in.
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
        """The weighted sum of each token's experts."""
        count, k = combine_weights.shape
        dim = tokens.shape[1]
        each = count * k // (self.devices * self.experts)  # rows of an expert from one device
        with jax.named_scope("dispatch"):
            if self.score_on_input:
                rows = weighed(tokens, combine_weights)
                combine_weights = jnp.ones_like(combine_weights)
            else:
                rows = _repeated(tokens, k)
            rows = rows.reshape(each, self.devices * self.experts, dim).swapaxes(0, 1)
            rows = self._exchange(rows.reshape(self.devices, self.experts, each, dim))
            rows = checkpoint_name(rows, EXCHANGED).swapaxes(0, 1)
            rows = rows.reshape(self.experts, self.devices * each, dim)
        with jax.named_scope("experts"):
            rows = self.compute(expert_weights, rows)
        with jax.named_scope("combine"):
            rows = rows.reshape(self.experts, self.devices, each, dim).swapaxes(0, 1)
            rows = checkpoint_name(self._exchange(rows), EXCHANGED)
            rows = rows.reshape(self.devices * self.experts, each, dim).swapaxes(0, 1)
            return _sum_in_order(rows.reshape(count, k, dim), combine_weights)

    def _exchange(self, pieces: Float[Array, "D L C M"]) -> Float[Array, "D L C M"]:
        if not self.axes:
            return pieces
        return jax.lax.all_to_all(pieces, self.axes, split_axis=0, concat_axis=0, tiled=True)


def _sum_in_order(y: Float[Array, "T K M"], weights: Float[Array, "T K"]) -> Float[Array, "T M"]:
    """The weighted sum over k, one after the other, in float32."""
    total = jnp.zeros((), jnp.float32)
    for k in range(weights.shape[1]):
        total = total + weights[:, k, None] * y[:, k].astype(jnp.float32)
    return total.astype(y.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _repeated(tokens: Float[Array, "T M"], k: int) -> Float[Array, "T K M"]:
    """Every token k times; the gradient is summed as the answers are, in order, in float32."""
    return jnp.broadcast_to(tokens[:, None], (tokens.shape[0], k, tokens.shape[1]))


def _repeated_fwd(tokens: Float[Array, "T M"], k: int) -> tuple[Float[Array, "T K M"], None]:
    return _repeated(tokens, k), None


def _repeated_bwd(
    _k: int, _residual: None, gradient: Float[Array, "T K M"]
) -> tuple[Float[Array, "T M"]]:
    return (_sum_in_order(gradient, jnp.ones(gradient.shape[:2], jnp.float32)),)


_repeated.defvjp(_repeated_fwd, _repeated_bwd)
