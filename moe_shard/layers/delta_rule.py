"""Compute the gated delta rule by chunks of tokens (arXiv 2412.06464), in float32.

Each value head has a state, a matrix that maps keys to values. Token by token,

    S_t = S_(t-1) exp(g_t);  u_t = rate_t (v_t - k_t S_t);  S_t = S_t + k_t^T u_t;  y_t = q_t S_t

where g_t <= 0. The first token of a document begins with a state of 0. In a chunk of C tokens the u
depend on each other by a unit lower triangular matrix, which is inverted; the state then passes
from chunk to chunk in a scan (WY form, arXiv 2406.06484). With chunks of one token this is the
recurrence above, as decoding has it.

    n  chunks      c, t  tokens of one      J  key heads      R  value heads of each
    D  elements of a key      E  elements of a value
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

_HIGHEST = jax.lax.Precision.HIGHEST


class DeltaInputs(NamedTuple):
    """Hold what the rule reads of each token.

    Attributes:
        query: q, scaled.
        key: k.
        value: v.
        log_decay: g, the logarithm of what the state is multiplied by; at most 0.
        rate: how much of the difference between a value and what the state has is written.
        begins: 1 for the first token of a document, else 0.
    """

    query: Float[Array, "B S J D"]
    key: Float[Array, "B S J D"]
    value: Float[Array, "B S J R E"]
    log_decay: Float[Array, "B S J R"]
    rate: Float[Array, "B S J R"]
    begins: Int[Array, "B S"]


def gated_delta_rule(
    inputs: DeltaInputs, state: Float[Array, "B J R D E"], *, chunk_size: int
) -> tuple[Float[Array, "B S J R E"], Float[Array, "B J R D E"]]:
    """Return each token's value from the state, and the state after the last one; in float32.

    Args:
        inputs: of S tokens, in the order of the text.
        state: the state before the first of them.
        chunk_size: C, a power of two; fewer tokens are one smaller chunk.
    """
    tokens = inputs.value.shape[1]
    size = min(chunk_size, 1 << (tokens - 1).bit_length())
    chunks = _Chunks.of(inputs, size)
    state, y = jax.lax.scan(_pass_chunk, state.astype(jnp.float32), chunks)
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :tokens], state


class _Chunks(NamedTuple):
    """Hold of each chunk what does not depend on the state before it."""

    query: Float[Array, "n B c J D"]
    reads: Float[Array, "n B c J R"]
    """Decay of the state before the chunk up to each token; 0 beyond the chunk's first document."""
    scores: Float[Array, "n B J R c t"]
    values: Float[Array, "n B J R c E"]
    keys: Float[Array, "n B J R c D"]
    """u_t is a row of `values` less the state's values of a row of `keys`."""
    key: Float[Array, "n B c J D"]
    to_end: Float[Array, "n B c J R"]
    """Decay from each token to the chunk's end; 0 for documents that end in it."""

    @classmethod
    def of(cls, inputs: DeltaInputs, size: int) -> _Chunks:
        query, key, value, log_decay, rate, begins = (_split(each, size) for each in inputs)
        document = jnp.cumsum(begins, axis=2)
        total = jnp.cumsum(log_decay, axis=2)
        place = jnp.arange(size)
        seen = (document[:, :, :, None] == document[:, :, None]) & (place[:, None] >= place)
        pairs = _masked_exp(_pairs(total) - _pairs(total).swapaxes(-1, -2), seen[:, :, None, None])
        reads = _masked_exp(total, (document == 0)[..., None, None])
        last = document == document[:, :, -1:]
        to_end = _masked_exp(total[:, :, -1:] - total, last[..., None, None])

        def products(of: Float[Array, "n B c J D"]) -> Float[Array, "n B J R c t"]:
            return _einsum("nbcjd,nbtjd->nbjct", of, key)[:, :, :, None] * pairs

        by_token = rate.transpose(0, 1, 3, 4, 2)
        below = jnp.where(place[:, None] > place, products(key) * by_token[..., None], 0)
        solved = _inverse(below)
        values = _einsum("nbjrct,nbtjre->nbjrce", solved, value * rate[..., None])
        keys = _einsum("nbjrct,nbtjrd->nbjrcd", solved, _each(key, rate * reads))
        return cls(query, reads, products(query), values, keys, key, to_end)


def _pass_chunk(
    state: Float[Array, "B J R D E"], chunk: _Chunks
) -> tuple[Float[Array, "B J R D E"], Float[Array, "B c J R E"]]:
    """Read and write the state for the tokens of one chunk."""
    written = chunk.values - _einsum("bjrcd,bjrde->bjrce", chunk.keys, state)
    y = _einsum("bjrct,bjrte->bcjre", chunk.scores, written)
    y += _einsum("bcjrd,bjrde->bcjre", _each(chunk.query, chunk.reads), state)
    state = state * chunk.reads[:, -1, ..., None, None]
    state += _einsum("bcjrd,bjrce->bjrde", _each(chunk.key, chunk.to_end), written)
    return state, y


def _each(key: Float[Array, "*n c J D"], by: Float[Array, "*n c J R"]) -> Float[Array, "..."]:
    """Multiply a key head's vectors by a number of each of its value heads."""
    return key[..., None, :] * by[..., None]


def _pairs(total: Float[Array, "n B c J R"]) -> Float[Array, "n B J R c 1"]:
    return total.transpose(0, 1, 3, 4, 2)[..., None]


def _masked_exp(x: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Return exp(x) where the mask is true, else 0, without a gradient of what is not finite."""
    return jnp.where(mask, jnp.exp(jnp.where(mask, x, 0)), 0)


def _split(x: Shaped[Array, "B S *dims"], size: int) -> Shaped[Array, "n B c *dims"]:
    """Split tokens into chunks, in front; absent tokens of the last one change nothing."""
    x = x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(jnp.float32)
    pad = -x.shape[1] % size
    x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _einsum(formula: str, *arrays: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.einsum(formula, *arrays, precision=_HIGHEST)


@jax.custom_vjp
def _inverse(below: Float[Array, "*n c c"]) -> Float[Array, "*n c c"]:
    """Invert I + `below`, which is strictly lower triangular, by halves.

    Of two neighbouring blocks on the diagonal that are inverted, X1 and X2, with A between them,
    the inverse together has -X2 A X1 there. It is all products, so it is batched and partitioned
    like them, and as stable as substitution.
    """
    size = below.shape[-1]
    place = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=below.dtype), below.shape)
    half = 1
    while half < size:
        block = place // half
        between = (block[:, None] == block + 1) & (block % 2 == 0)
        step = _einsum("...ab,...bc->...ac", jnp.where(between, below, 0), inverse)
        inverse = inverse - _einsum("...ab,...bc->...ac", inverse, step)
        half *= 2
    return inverse


def _inverse_fwd(
    below: Float[Array, "*n c c"],
) -> tuple[Float[Array, "*n c c"], Float[Array, "*n c c"]]:
    inverse = _inverse(below)
    return inverse, inverse


def _inverse_bwd(
    inverse: Float[Array, "*n c c"], gradient: Float[Array, "*n c c"]
) -> tuple[Float[Array, "*n c c"]]:
    inner = _einsum("...ba,...bc->...ac", inverse, gradient)
    return (-_einsum("...ab,...cb->...ac", inner, inverse),)


_inverse.defvjp(_inverse_fwd, _inverse_bwd)
