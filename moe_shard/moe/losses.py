"""Compute the auxiliary losses of the router.

A layer returns statistics of each sequence, and the losses are computed once for all layers, next
to the training loss, so that a layer adds no collective. Fractions count choices before any is
dropped. Padding counts nowhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from moe_shard.config.moe_config import LoadBalanceLoss


def expert_counts(indices: Int[Array, "B S K"], num_experts: int) -> Int[Array, "B E"]:
    """Count the choices of each sequence for each expert; a choice E, of none, does not count."""
    return jnp.sum(jax.nn.one_hot(indices, num_experts, dtype=jnp.int32), axis=(1, 2))


def mean_over_tokens(
    values: Float[Array, "B S *dims"], real: Bool[Array, "B S"] | None
) -> Float[Array, "B *dims"]:
    """Average over the tokens of each sequence that are not padding; 0 where all are.

    Args:
        values: one for each token, or more.
        real: which tokens are not padding; None: all.
    """
    if real is None:
        return jnp.mean(values, axis=1)
    kept = real.reshape(real.shape + (1,) * (values.ndim - 2))
    count = jnp.maximum(jnp.sum(kept, axis=1), 1)
    return jnp.sum(jnp.where(kept, values, 0), axis=1) / count


def mean_over_sequences(
    means: Float[Array, "L B *dims"], tokens: Num[Array, "L B"] | None
) -> Float[Array, "L *dims"]:
    """Average over sequences what was averaged over the tokens of each.

    Args:
        means: the averages.
        tokens: tokens of each sequence that are not padding; None: all have as many.
    """
    if tokens is None:
        return jnp.mean(means, axis=1)
    weights = tokens.reshape(tokens.shape + (1,) * (means.ndim - 2)).astype(jnp.float32)
    return jnp.sum(means * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)


def load_balance_loss(
    mean_probs: Float[Array, "L B E"],
    counts: Int[Array, "L B E"],
    *,
    tokens: int | Int[Array, "L B"],
    k: int,
    convention: LoadBalanceLoss,
) -> Float[Array, ""]:
    """Sum over experts the mean probability times the fraction of choices.

    - "maxtext": for each sequence of each layer, times E, the fractions summing to K: K when
      balanced, E when k = 1 and all tokens choose one expert; then the mean. As in MaxText until
      0.2.5; local to a sequence.
    - "sequence": the same divided by K, 1 when balanced; as in MaxText from 0.2.5 on.
    - "gshard": for each layer over the whole batch, normalised to 1 when balanced (GShard, arXiv
      2006.16668; Switch Transformer, arXiv 2101.03961, for k = 1); then the mean over layers.
    - "huggingface": over the whole batch and all layers together, K when balanced, as
      transformers' `load_balancing_loss_func` computes it.

    Args:
        mean_probs: mean probabilities over the tokens of each sequence.
        counts: number of choices of each expert, see `expert_counts`.
        tokens: S, tokens of a sequence, or how many of each are not padding.
        k: K, experts per token.
        convention: one of the above.
    """
    num_experts = mean_probs.shape[-1]
    over: tuple[int, ...] = ()
    match convention:
        case "gshard":
            over = (1,)
        case "huggingface":
            over = (0, 1)
    if not isinstance(tokens, int):
        # A sequence weighs as much as it has tokens in what is averaged over sequences.
        tokens = tokens[..., None].astype(jnp.float32)
        mean = jnp.maximum(jnp.mean(tokens, axis=over, keepdims=True), 1)
        mean_probs, tokens = mean_probs * (tokens / mean), mean
    fraction = counts.astype(jnp.float32) / tokens
    if convention in ("sequence", "gshard"):
        fraction = fraction / k
    together = jnp.mean(mean_probs, axis=over) * jnp.mean(fraction, axis=over)
    return num_experts * jnp.mean(jnp.sum(together, axis=-1))


def router_z_loss(
    logits: Float[Array, "B S E"], real: Bool[Array, "B S"] | None = None
) -> Float[Array, "B"]:
    """Average the squared logsumexp of the logits (ST-MoE, arXiv 2202.08906, equation 5).

    Args:
        logits: the router's.
        real: which tokens are not padding; None: all.
    """
    log_z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    return mean_over_tokens(jnp.square(log_z), real)
