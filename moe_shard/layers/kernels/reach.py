"""Say which keys a query sees as one range of places in the sequence.

Where keys are in the order of the sequence and each document is in one piece, what a token sees is
a range that ends with itself: from the start of its document, its window or its chunk. Two numbers
a token take the place of a mask of S x T elements, and of positions and segment ids in a kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from moe_shard.layers.kernels.rule import AttentionRule, Tokens


class InSequence(NamedTuple):
    """Hold keys, values and their tokens in the order of the sequence."""

    key: Float[Array, "B T J D"]
    value: Float[Array, "B T J Dv"]
    tokens: Tokens


def in_sequence(
    key: Float[Array, "B T J D"], value: Float[Array, "B T J Dv"], keys: Tokens
) -> InSequence:
    """Bring keys and values into the order of the sequence.

    Devices that share a sequence may each have an early and a late part of it, for equal work.

    Args:
        key: a whole sequence.
        value: values of the same tokens.
        keys: those tokens, with the place of each.
    """
    order = keys.order
    assert order is not None, "without a cache the places of tokens are known"
    place = np.arange(key.shape[1], dtype=np.int32)
    if isinstance(order, np.ndarray):
        if np.array_equal(order, place):
            return InSequence(key, value, keys)
        at = jnp.asarray(np.argsort(order).astype(np.int32))
    else:
        at = jnp.zeros_like(order).at[order].set(place, unique_indices=True)

    def take(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
        return _permuted(x, at, jnp.asarray(order))

    tokens = Tokens(take(keys.positions), take(keys.segment_ids), place)
    return InSequence(take(key), take(value), tokens)


@jax.custom_vjp
def _permuted(
    x: Shaped[Array, "B T ..."], places: Int[Array, "T"], _back: Int[Array, "T"]
) -> Shaped[Array, "B T ..."]:
    """Permute tokens; the gradient is the permutation back, which is no sum over places."""
    return jnp.take(x, places, axis=1, unique_indices=True, mode="clip")


def _permuted_forward(
    x: Shaped[Array, "B T ..."], places: Int[Array, "T"], back: Int[Array, "T"]
) -> tuple[Shaped[Array, "B T ..."], Int[Array, "T"]]:
    return _permuted(x, places, back), back


def _permuted_backward(
    back: Int[Array, "T"], gradient: Shaped[Array, "B T ..."]
) -> tuple[Shaped[Array, "B T ..."], None, None]:
    return jnp.take(gradient, back, axis=1, unique_indices=True, mode="clip"), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


def rising(queries: Tokens) -> Int[Array, "S"] | Int[np.ndarray, "S"]:
    """Return the places of queries, which must rise: a kernel meets a range of blocks."""
    order = queries.order
    assert order is not None, "without a cache the places of tokens are known"
    assert not isinstance(order, np.ndarray) or bool(np.all(np.diff(order) > 0)), order
    return order


class Reach(NamedTuple):
    """Hold the places of the first and the last key that each query sees."""

    first: Int[Array, "B S"]
    last: Int[Array, "B S"]


def reach_of(queries: Tokens, keys: Tokens, *, rule: AttentionRule) -> Reach:
    """Return what each query sees.

    Args:
        queries: with the place of each in the sequence.
        keys: all tokens of the sequence in order, the tokens of a document one after another.
        rule: the layer's span.
    """
    ids = keys.segment_ids
    place = jnp.arange(ids.shape[1], dtype=jnp.int32)
    starts = jnp.concatenate(
        [jnp.ones_like(ids[:, :1], dtype=bool), ids[:, 1:] != ids[:, :-1]], axis=1
    )
    of_document = jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
    order = jnp.asarray(rising(queries), jnp.int32)
    first = jnp.take(of_document, order, axis=1)
    if rule.span == "sliding":
        first = jnp.maximum(first, order - (rule.window - 1))
    elif rule.span == "chunked":
        in_chunk = (queries.positions % rule.window).astype(jnp.int32)
        first = jnp.maximum(first, order - in_chunk)
    return Reach(first, jnp.broadcast_to(order, first.shape))
