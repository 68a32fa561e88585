"""Route: score every expert, choose the top k, and weight the chosen ones.

This is arithmetic only: it needs no mesh, because every step is local to a token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moe_shard.config.moe_config import RouterConfig
from moe_shard.layers.norm import normalise
from moe_shard.moe.axes import ROUTER_KERNEL, ROUTER_SCALE, ROUTER_VECTOR
from moe_shard.sharding.parameter import parameter

ROUTING = "routing"
"""Name under which every remat policy saves the routing decision, so that it is not recomputed."""


class Routing(NamedTuple):
    """Hold the routing decision. All floats are float32.

    Attributes:
        logits: raw scores, a learned bias included.
        probs: scores over all experts that sum to 1, for the load-balance loss.
        indices: the chosen experts, best first; E, which is none, for padding.
        weights: the combine weights of the chosen experts.
        real: which tokens are not padding; None where the layer was not told of any.
    """

    logits: Float[Array, "B S E"]
    probs: Float[Array, "B S E"]
    indices: Int[Array, "B S K"]
    weights: Float[Array, "B S K"]
    real: Bool[Array, "B S"] | None = None

    def of_real(self, real: Bool[Array, "B S"]) -> Routing:
        """Return the decision without padding, which has no expert and no weight.

        Args:
            real: which tokens are not padding.
        """
        indices = jnp.where(real[..., None], self.indices, self.probs.shape[-1])
        weights = jnp.where(real[..., None], self.weights, 0.0)
        return self._replace(indices=indices, weights=weights, real=real)


def top_k_indices(scores: Float[Array, "B S E"], k: int) -> Int[Array, "B S K"]:
    """Return the indices of the k largest scores, largest first; of equal scores the first.

    It repeats argmax and mask, because for `lax.top_k` over a batch-sharded array the partitioner
    gathers the whole batch on CPU, and on TPU it reads four times the bytes.
    """
    # Above the mask's -inf, so that an expert that was masked before is not chosen twice.
    scores = jnp.maximum(scores, jnp.finfo(scores.dtype).min)
    chosen = []
    for _ in range(k):
        best = jnp.argmax(scores, axis=-1)
        chosen.append(best)
        scores = _without(scores, best)
    return jnp.stack(chosen, axis=-1)


def _without(scores: Float[Array, "*B E"], index: Int[Array, "*B"]) -> Float[Array, "*B E"]:
    return jnp.where(jax.nn.one_hot(index, scores.shape[-1], dtype=jnp.bool_), -jnp.inf, scores)


def _at(values: Float[Array, "B S E"], index: Int[Array, "B S"]) -> Float[Array, "B S"]:
    """Pick one value of each token by a mask, whose gradient is a product and not a scatter."""
    return jnp.sum(values * jax.nn.one_hot(index, values.shape[-1]), axis=-1)


def _normalised(scores: Float[Array, "B S N"], epsilon: float = 0.0) -> Float[Array, "B S N"]:
    """Divide each score by the sum of its token's scores and epsilon; if all are 0 they stay 0."""
    # Sigmoids of logits far below 0 may all be 0. The derivative divides by the square of the sum,
    # which must not be 0 either.
    total = jnp.sum(scores, axis=-1, keepdims=True)
    return scores / jnp.maximum(total + epsilon if epsilon else total, 1e-15)


def round_robin(*, tokens: int, k: int, num_experts: int) -> Int[np.ndarray, "S K"]:
    """Assign experts round-robin to the choices of a sequence, for forced balance.

    As K is at most E, no token has an expert twice.
    """
    return np.arange(tokens * k, dtype=np.int32).reshape(tokens, k) % num_experts


def shuffled(logits: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
    """Hash the logits' bits and the expert to uniform random scores (MurmurHash3's finaliser).

    Unlike a seeded draw they need no key, differ from layer to layer and step to step, and come
    out the same when a backward pass computes them again.
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32)
    bits = bits ^ (jnp.arange(logits.shape[-1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return (bits ^ (bits >> 16)).astype(jnp.float32)


def mask_groups(scores: Float[Array, "B S E"], config: RouterConfig) -> Float[Array, "B S E"]:
    """Mask with -inf the scores outside the groups that a token may choose from.

    Sources: DeepSeek-V2 (arXiv 2405.04434, section 2.2.2), which ranks groups by their best
    expert, and DeepSeek-V3 (arXiv 2412.19437), which ranks them by the sum of their best two.
    """
    groups, allowed = config.groups
    if allowed == groups:
        return scores
    batch, tokens, num_experts = scores.shape
    by_group = scores.reshape(batch, tokens, groups, num_experts // groups)
    of_group = jnp.max(by_group, axis=-1)
    if config.routing_group_score == "top2_sum":
        best = jnp.argmax(by_group, axis=-1)
        of_group = of_group + jnp.max(_without(by_group, best), axis=-1)
    chosen = top_k_indices(of_group, allowed)
    is_allowed = jnp.any(jax.nn.one_hot(chosen, groups, dtype=jnp.bool_), axis=-2)
    return jnp.where(jnp.repeat(is_allowed, num_experts // groups, axis=-1), scores, -jnp.inf)


def _choose(
    scores: Float[Array, "B S E"], logits: Float[Array, "B S E"], k: int, config: RouterConfig
) -> Int[Array, "B S K"]:
    batch, tokens, num_experts = scores.shape
    if config.force_load_balance:
        of_sequence = round_robin(tokens=tokens, k=k, num_experts=num_experts)
        return jnp.broadcast_to(of_sequence, (batch, *of_sequence.shape))
    if config.use_random_routing:
        return top_k_indices(shuffled(logits), k)
    return top_k_indices(mask_groups(scores, config), k)


def _balance_probs(
    logits: Float[Array, "B S E"],
    scores: Float[Array, "B S E"],
    correction: Float[Array, "E"] | None,
    config: RouterConfig,
) -> Float[Array, "B S E"]:
    """Return the probabilities in the load-balance loss."""
    match config.load_balance_probs:
        case "softmax":
            return jax.nn.softmax(scores, axis=-1)
        case "ranked":
            biased = scores if correction is None else scores + jax.lax.stop_gradient(correction)
            return jax.nn.softmax(biased, axis=-1)
        case "logits":
            return jax.nn.softmax(logits, axis=-1)
        case "scores":
            # A softmax already sums to 1.
            return _normalised(scores) if config.routed_score_func == "sigmoid" else scores


def _sparsemixer_weights(
    logits: Float[Array, "B S E"], indices: Int[Array, "B S K"], *, jitter: float
) -> Float[Array, "B S K"]:
    """Weight each chosen expert by a softmax over the logits near it, without earlier choices.

    As Phi-3.5-MoE computes it at evaluation (SparseMixer-v2, arXiv 2409.12136). Its training form
    draws experts at random and corrects the gradient for that; here the best are taken, and the
    gradient is the softmax's.
    """
    left = logits
    weights = []
    for slot in range(indices.shape[-1]):
        index = indices[..., slot]
        best = jax.lax.stop_gradient(_at(logits, index))[..., None]
        far = (best - logits) / jnp.maximum(jnp.abs(logits), best) > 2 * jitter
        weights.append(_at(jax.nn.softmax(jnp.where(far, -jnp.inf, left), axis=-1), index))
        left = _without(left, index)
    return jnp.stack(weights, axis=-1)


def route(
    logits: Float[Array, "B S E"],
    k: int,
    *,
    config: RouterConfig,
    correction: Float[Array, "E"] | None = None,
    scale: Float[Array, "E"] | None = None,
) -> Routing:
    """Score all experts, choose the k best, and compute their combine weights.

    Args:
        logits: the router's raw scores.
        k: K, experts per token.
        config: score function, groups, normalisation and scaling of the weights.
        correction: added to the scores by which experts are chosen, not to the combine weights.
        scale: factor of each expert's combine weights.
    """
    logits = logits.astype(jnp.float32)
    if config.routed_score_func == "sigmoid":
        scores = jax.nn.sigmoid(logits)
    else:
        scores = jax.nn.softmax(logits, axis=-1)
    probs = _balance_probs(logits, scores, correction, config)
    # By score, not by logit: the softmax may round two logits to one, and ties go to the first.
    ranked = jax.lax.stop_gradient(scores if correction is None else scores + correction)
    chosen = _choose(ranked, jax.lax.stop_gradient(logits), k, config)
    indices = checkpoint_name(chosen, ROUTING)
    if config.routed_score_func == "sparsemixer":
        weights = _sparsemixer_weights(logits, indices, jitter=config.sparsemixer_jitter)
    else:
        weights = jnp.stack([_at(scores, indices[..., slot]) for slot in range(k)], axis=-1)
    if config.norm_topk_prob:
        weights = _normalised(weights, config.norm_topk_epsilon)
    if config.routed_scaling_factor != 1:
        weights = weights * config.routed_scaling_factor
    if scale is not None:
        scales = jnp.broadcast_to(scale, logits.shape)
        of_choice = [_at(scales, indices[..., slot]) for slot in range(k)]
        weights = weights * jnp.stack(of_choice, axis=-1)
    return Routing(logits, probs, indices, weights)


class Router(nnx.Module):
    """Map the model dim to one score per expert, in float32, then `route`.

    Args:
        model_dim: M, the model dim.
        num_experts: E, experts of the layer.
        k: K, experts per token.
        config: see `route`; also states which biases, norm and factors there are.
        rngs: source of the initial kernel.
        norm_epsilon: number added to the mean square of the input, where it is normalised.
    """

    def __init__(
        self,
        *,
        model_dim: int,
        num_experts: int,
        k: int,
        config: RouterConfig,
        rngs: nnx.Rngs,
        norm_epsilon: float = 1e-6,
    ) -> None:
        init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        self.kernel = parameter(
            init(rngs.params(), (model_dim, num_experts), jnp.float32),
            ROUTER_KERNEL,
        )

        def vector(value: float = 0.0) -> nnx.Param[Array]:
            return parameter(jnp.full((num_experts,), value, jnp.float32), ROUTER_VECTOR)

        self.scale = (
            parameter(jnp.ones((model_dim,), jnp.float32), ROUTER_SCALE)
            if config.router_norm
            else None
        )
        self.bias = vector() if config.router_bias else None
        # No gradient reaches it, so no optimizer moves it; `program.balance` may.
        self.correction_bias = vector() if config.routed_bias else None
        self.expert_scale = vector(1.0) if config.router_expert_scale else None
        self.k = k
        self.config = config
        self.norm_epsilon = norm_epsilon

    def __call__(self, x: Float[Array, "B S M"]) -> Routing:
        """Route every token of `x`."""
        x = x.astype(jnp.float32)
        if self.scale is not None:
            x = normalise(x, epsilon=self.norm_epsilon) * self.scale[...] * x.shape[-1] ** -0.5
        # HIGHEST: accelerators would round float32 operands to bfloat16, and rounding would then
        # decide a near tie.
        logits = jnp.einsum(
            "bsm,me->bse",
            x,
            self.kernel[...],
            precision=jax.lax.Precision.HIGHEST,
        )
        if self.bias is not None:
            logits = logits + self.bias[...]
        correction = None if self.correction_bias is None else self.correction_bias[...]
        scale = None if self.expert_scale is None else self.expert_scale[...]
        return route(logits, self.k, config=self.config, correction=correction, scale=scale)
