"""Keep what attention needs of earlier tokens while a text is generated token by token.

A cache has T places for tokens. Each place records its token's position and document, once for
all layers, so a cache can be filled in any order and an empty place belongs to no document.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Int, Shaped

LayerCache = dict[str, Shaped[Array, "B T ..."]]
"""One layer's cached arrays by name; their last dims are each kind of attention's own."""

EMPTY = -1
"""Segment id of a place without a token."""


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
