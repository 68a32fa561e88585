"""The router: scores for every expert, the top-k choice, and the weights of the chosen.

Arithmetic only: no mesh, and nothing here needs one, because every step is local to a token.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


Choice = Literal["learned", "round_robin", "random"]
"""How experts are chosen; the last two are for benchmarks and leave the weights the router's."""


def round_robin(*, tokens: int, k: int, num_experts: int) -> Int[np.ndarray, "S K"]:
    """Experts dealt out in turn to the choices of a batch row: forced balance.

    With at most E experts a token, no token meets an expert twice.
    """
    return np.arange(tokens * k, dtype=np.int32).reshape(tokens, k) % num_experts


def shuffled(logits: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
    """Uniform random scores: hashes of the logits' bits and the expert (MurmurHash3's finaliser).

    Unlike a seeded draw they need no key, differ from layer to layer and step to step, and come
    out the same when a backward pass computes them again.
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32)
    bits = bits ^ (jnp.arange(logits.shape[-1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return (bits ^ (bits >> 16)).astype(jnp.float32)


def _choose(logits: Float[Array, "B S E"], k: int, choice: Choice) -> Int[Array, "B S K"]:
    batch, tokens, num_experts = logits.shape
    if choice == "round_robin":
        row = round_robin(tokens=tokens, k=k, num_experts=num_experts)
        return jnp.broadcast_to(row, (batch, *row.shape))
    return top_k_indices(shuffled(logits) if choice == "random" else logits, k)


def route(
    logits: Float[Array, "B S E"], k: int, *, renormalise: bool, choice: Choice = "learned"
) -> Routing:
    """Softmax over all experts, then the k most probable ones.

    Args:
        logits: the router's scores.
        k: experts per token.
        renormalise: divide the k weights by their sum, as Mixtral does.
        choice: of the experts.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    # By probability, not by score: softmax may round two scores to one, and ties go to the first.
    scores = jax.lax.stop_gradient(probs if choice == "learned" else logits)
    indices = checkpoint_name(_choose(scores, k, choice), ROUTING)
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
        choice: of the experts.
        rngs: source of the initial kernel.
    """

    def __init__(
        self,
        *,
        model_dim: int,
        num_experts: int,
        k: int,
        renormalise: bool,
        choice: Choice,
        rngs: nnx.Rngs,
    ) -> None:
        init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        self.kernel = nnx.Param(
            init(rngs.params(), (model_dim, num_experts), jnp.float32),
            logical_axes=ROUTER_KERNEL,
        )
        self.k = k
        self.renormalise = renormalise
        self.choice = choice

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
        return route(logits, self.k, renormalise=self.renormalise, choice=self.choice)
