"""Convolve each channel over the last few tokens of its document.

The sums are of shifted arrays, so any dims may follow those of sequences and tokens, and all but
that of tokens may be sharded.

    K  taps: a token and the K - 1 before it
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_shard.layers.cache import Memory


class Earlier(NamedTuple):
    """Hold what a convolution reads of the tokens before a call.

    Attributes:
        inputs: their inputs.
        segment_ids: their documents.
    """

    inputs: Float[Array, "B before *C"]
    segment_ids: Int[Array, "B before"]


def causal_conv(
    x: Float[Array, "B S *C"],
    kernel: Float[Array, "K *C"],
    segment_ids: Int[Array, "B S"],
    earlier: Earlier | None = None,
) -> tuple[Float[Array, "B S *C"], Float[Array, "B before *C"]]:
    """Sum each channel's last K inputs, weighted by the taps, within a document; in float32.

    y[t] = sum over b of kernel[K - 1 - b] * x[t - b], for the tokens t - b of the document of t.

    Args:
        x: inputs.
        kernel: taps; the last is that of the token itself.
        segment_ids: equal for tokens of one document, which stand together.
        earlier: the K - 1 tokens before x; None: there are none.

    Returns:
        The sums in the dtype of x, and the last K - 1 inputs, for the next call.
    """
    before, tokens = kernel.shape[0] - 1, x.shape[1]
    if earlier is None:
        pad = ((0, 0), (before, 0))
        # What an absent token adds is 0, so its document does not matter.
        whole = jnp.pad(x, (*pad, *((0, 0),) * (x.ndim - 2)))
        documents = jnp.pad(segment_ids, pad)
    else:
        whole = jnp.concatenate([earlier.inputs.astype(x.dtype), x], axis=1)
        documents = jnp.concatenate([earlier.segment_ids, segment_ids], axis=1)
    taps = kernel.astype(jnp.float32)
    total = x.astype(jnp.float32) * taps[before]
    for back in range(1, before + 1):
        first = before - back
        same = documents[:, first : first + tokens] == segment_ids
        shifted = whole[:, first : first + tokens].astype(jnp.float32) * taps[first]
        total += jnp.where(same.reshape(*same.shape, *(1,) * (x.ndim - 2)), shifted, 0)
    return total.astype(x.dtype), whole[:, tokens:]


def earlier_in(memory: Memory | None, name: str) -> Earlier | None:
    """Return the inputs that an earlier call has left in a layer's cache.

    Args:
        memory: the cache; None in training.
        name: the array's name there.
    """
    if memory is None:
        return None
    inputs = memory.layer[name]
    return Earlier(inputs, memory.documents_before(inputs.shape[1]))


def first_of_document(segment_ids: Int[Array, "B S"], memory: Memory | None) -> Int[Array, "B S"]:
    """Return 1 for each token that begins a document, 0 for those that go on with one.

    Args:
        segment_ids: equal for tokens of one document, which stand together.
        memory: cache of earlier calls; None in training, where the first token begins one.
    """
    if memory is None:
        inside = (segment_ids[:, 1:] != segment_ids[:, :-1]).astype(jnp.int32)
        return jnp.pad(inside, ((0, 0), (1, 0)), constant_values=1)
    before = jnp.concatenate([memory.documents_before(1), segment_ids[:, :-1]], axis=1)
    return (segment_ids != before).astype(jnp.int32)
