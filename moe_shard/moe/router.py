"""The router: scores for every expert, the top-k choice, and the weights of the chosen.

Arithmetic only: no mesh, and nothing here needs one, because every step is local to a token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_shard.moe.placement import ROUTER_KERNEL

ROUTING = "routing"
"""Name under which every remat policy saves the choice, so that recomputation repeats it."""


class Routing(NamedTuple):
    """What the router decided. All floats are float32.

    Attributes:
        logits: raw scores.
        probs: softmax of the scores over all experts.
        indices: the chosen experts, best first.
        weights: how much each chosen expert counts; sums to 1 over K where renormalised.
    """

    logits: Float[Array, "B S E"]
    probs: Float[Array, "B S E"]
    indices: Int[Array, "B S K"]
    weights: Float[Array, "B S K"]


def top_k_indices(scores: Float[Array, "B S E"], k: int) -> Int[Array, "B S K"]:
    """Positions of the k largest scores, largest first; of equal scores the first.

    Rounds of argmax and mask, because the partitioner gathers the whole batch for `lax.top_k`
    over a batch-sharded array, on CPU, and on TPU it reads four times the bytes.
    """
    num_experts = scores.shape[-1]
    # Above the mask's -inf, so that an expert that was masked before is not chosen twice.
    scores = jnp.maximum(scores, jnp.finfo(scores.dtype).min)
    chosen = []
    for _ in range(k):
        best = jnp.argmax(scores, axis=-1)
        chosen.append(best)
        scores = jnp.where(jax.nn.one_hot(best, num_experts, dtype=jnp.bool_), -jnp.inf, scores)
    return jnp.stack(chosen, axis=-1)


def route(logits: Float[Array, "B S E"], k: int, *, renormalise: bool) -> Routing:
    """Softmax over all experts, then the k most probable ones.

    Args:
        logits: the router's scores.
        k: experts per token.
        renormalise: divide the k weights by their sum, as Mixtral does.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    indices = checkpoint_name(top_k_indices(jax.lax.stop_gradient(probs), k), ROUTING)
    # One mask per choice rather than take_along_axis: its gradient is a product, not a scatter.
    weights = jnp.stack(
        [
            jnp.sum(probs * jax.nn.one_hot(indices[..., slot], probs.shape[-1]), axis=-1)
            for slot in range(k)
        ],
        axis=-1,
    )
    if renormalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(logits, probs, indices, weights)


class Router(nnx.Module):
    """A float32 linear map from the model dim to one score per expert, then `route`.

    Args:
        model_dim: M.
        num_experts: E.
        k: experts per token.
        renormalise: see `route`.
        rngs: source of the initial kernel.
    """

    def __init__(
        self, *, model_dim: int, num_experts: int, k: int, renormalise: bool, rngs: nnx.Rngs
    ) -> None:
        init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        self.kernel = nnx.Param(
            init(rngs.params(), (model_dim, num_experts), jnp.float32),
            logical_axes=ROUTER_KERNEL,
        )
        self.k = k
        self.renormalise = renormalise

    def __call__(self, x: Float[Array, "B S M"]) -> Routing:
        """Route every token of `x`."""
        # HIGHEST: accelerators would round float32 operands to bfloat16, and a near tie would
        # then be decided by rounding.
        logits = jnp.einsum(
            "bsm,me->bse",
            x.astype(jnp.float32),
            self.kernel[...],
            precision=jax.lax.Precision.HIGHEST,
        )
        return route(logits, self.k, renormalise=self.renormalise)
