"""Keep what a layer needs of earlier tokens while a text is generated token by token.

A cache has T places for tokens. Each place records its token's position and document, once for
all layers, so a cache can be filled in any order and an empty place belongs to no document. Where a
layer has a state that each token changes, in place of keys and values, its cache is that state and
has no dim of places; it is filled in the order of the text.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

LayerCache = dict[str, Shaped[Array, "B ..."]]
"""One layer's cached arrays by name; the dims after the first are each kind of mixer's own."""

EMPTY = -1
"""Segment id of a place without a token."""

PADDING = 0
"""Segment id of the tokens that fill a sequence up, which belong to no document."""


class Memory(NamedTuple):
    """Pass one layer its cache, and what all layers share about its places.

    Attributes:
        layer: this layer's cache before this call.
        slot: place of this call's first token; the others follow it.
        positions: position of the token in each place, this call's tokens included.
        segment_ids: its document, likewise; `EMPTY` where there is no token.
    """

    layer: LayerCache
    slot: Int[Array, ""]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]

    def documents_before(self, tokens: int) -> Int[Array, "B before"]:
        """Return the documents of the tokens before this call's first one; `EMPTY` for none.

        Args:
            tokens: how many.
        """
        ids = jnp.pad(self.segment_ids, ((0, 0), (tokens, 0)), constant_values=EMPTY)
        return jax.lax.dynamic_slice_in_dim(ids, self.slot, tokens, axis=1)
