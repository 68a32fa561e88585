"""Run the state space of Mamba-2 over a sequence, by chunks (arXiv 2405.21060).

Each head has a state of P x D numbers. A token multiplies it by a decay and adds the outer product
of its values and its key; its output is the state times its query:

    state = exp(decay) * state + step * outer(value, key)
    output = state @ query

(The paper's x, B, C and A * dt are value, key, query and decay here.) Within a chunk of Q tokens
this is a product of queries and keys, masked and decayed, as in attention; between chunks only the
state is handed on. A chunk of one token is the recurrence itself, so generating token by token
needs no other code. All of it is in float32.

    G  groups of heads, which share keys and queries      R  heads of a group
    P  elements of a value      D  elements of a key      Q  tokens of a chunk
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Shaped

_FASTEST = 80.0
"""Largest decay, as a negative exponent: exp(-80) is nothing beside what a token adds."""


def scan_states(
    value: Float[Array, "B S G R P"],
    key: Float[Array, "B S G D"],
    query: Float[Array, "B S G D"],
    step: Float[Array, "B S G R"],
    decay: Float[Array, "B S G R"],
    starts: Bool[Array, "B S"],
    state: Float[Array, "B G R P D"],
    *,
    chunk: int,
) -> tuple[Float32[Array, "B S G R P"], Float32[Array, "B G R P D"]]:
    """Return the output of each token, and the state after the last one.

    Args:
        value: what a token adds to the state, before its step.
        key: where it is added.
        query: where the output is read.
        step: factor of what a token adds.
        decay: logarithm of the factor of the state before it, 0 or less.
        starts: whether a document starts at the token: its state is 0 before it.
        state: state before the first token.
        chunk: Q, tokens of a chunk; it changes rounding, time and memory only.
    """
    batch, length = value.shape[:2]
    chunk = min(chunk, length)
    more = -length % chunk

    def split(array: Shaped[Array, "B S *dims"]) -> Shaped[Array, "n B Q *dims"]:
        # A token of zeros changes no state: its factor is exp(0) and it adds nothing.
        padded = jnp.pad(array, ((0, 0), (0, more), *((0, 0),) * (array.ndim - 2)))
        return padded.reshape(batch, -1, chunk, *array.shape[2:]).swapaxes(0, 1)

    value, key, query, step, decay = (
        each.astype(jnp.float32) for each in (value, key, query, step, decay)
    )
    each = (value * step[..., None], key, query, jnp.maximum(decay, -_FASTEST), starts)
    # A chunk's Q x Q scores are computed again in the backward pass, which keeps states alone.
    run = jax.checkpoint(_chunk)
    after, found = jax.lax.scan(run, state.astype(jnp.float32), tuple(map(split, each)))
    return found.swapaxes(0, 1).reshape(batch, -1, *value.shape[2:])[:, :length], after


def _chunk(
    state: Float32[Array, "B G R P D"],
    chunk: tuple[
        Float32[Array, "B Q G R P"],
        Float32[Array, "B Q G D"],
        Float32[Array, "B Q G D"],
        Float32[Array, "B Q G R"],
        Bool[Array, "B Q"],
    ],
) -> tuple[Float32[Array, "B G R P D"], Float32[Array, "B Q G R P"]]:
    """Return the state after a chunk, and the outputs of its tokens."""
    added, key, query, decay, starts = chunk
    document = jnp.cumsum(starts, axis=1)  # 0: the one that the chunk begins in
    coarse, fine = _summed(decay)

    def factor(
        later: tuple[Float32[Array, "B _ _ G R"], Float32[Array, "B _ _ G R"]],
        earlier: tuple[Float32[Array, "B _ _ G R"], Float32[Array, "B _ _ G R"]],
        kept: Bool[Array, "B _ _"],
    ) -> Float32[Array, "B _ _ G R"]:
        """Return what is left of a state; where it is of another document, nothing."""
        exponent = (later[0] - earlier[0]) + (later[1] - earlier[1])
        return jnp.exp(jnp.where(kept[..., None, None], exponent, -jnp.inf))

    since = coarse[:, :, None], fine[:, :, None]  # up to each token, from the chunk's first on
    until = coarse[:, None], fine[:, None]
    nothing = jnp.zeros_like(until[0][:, :, :1]), jnp.zeros_like(until[0][:, :, :1])
    tokens = jnp.arange(decay.shape[1])
    earlier = tokens[:, None] >= tokens
    same = document[:, :, None] == document[:, None]
    between = factor(since, until, earlier & same)
    entered = factor(since, nothing, (document == 0)[..., None])[:, :, 0]
    last = coarse[:, -1:, None], fine[:, -1:, None]
    left = factor(last, until, same[:, -1:])[:, 0]

    scores = jnp.einsum("bigd,bjgd->bijg", query, key)[..., None] * between
    output = jnp.einsum("bijgr,bjgrp->bigrp", scores, added)
    output += jnp.einsum("bigd,bgrpd->bigrp", query, state) * entered[..., None]
    state = state * entered[:, -1, ..., None, None]
    state += jnp.einsum("bjgrp,bjgd->bgrpd", added * left[..., None], key)
    return state, output


def _summed(
    decay: Float32[Array, "B Q G R"],
) -> tuple[Float32[Array, "B Q G R"], Float32[Array, "B Q G R"]]:
    """Sum decays up to each token, as two numbers whose differences have no rounding to speak of.

    A sum of hundreds of decays may be thousands, and its difference to the next, of a token that
    decays by little, would be rounding. So what is a multiple of a power of two is summed by
    itself: such sums are exact below 2^24 multiples. The rest is small, and so is its rounding.
    """
    parts = 2.0 ** math.floor(24 - math.log2(_FASTEST * decay.shape[1]))
    coarse = jax.lax.stop_gradient(jnp.round(decay * parts) / parts)
    return jnp.cumsum(coarse, axis=1), jnp.cumsum(decay - coarse, axis=1)
