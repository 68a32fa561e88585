"""What attention keeps of the tokens before, while a text is written one token at a time.

T places for tokens. A token is found again by its position and its document, which the layers
share, so that a cache is filled in any order and an empty place belongs to no document.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Int, Shaped

LayerCache = dict[str, Shaped[Array, "B T ..."]]
"""One layer's cached arrays by name; their last dims are each kind of attention's own."""

EMPTY = -1
"""Segment of a place without a token."""


class Memory(NamedTuple):
    """One layer's cache, and what all layers know of its places.

    Attributes:
        layer: of this layer, before this call.
        slot: place of this call's first token; the others follow it.
        positions: of every place's token, this call's included.
        segment_ids: likewise; `EMPTY` where there is none.
    """

    layer: LayerCache
    slot: Int[Array, ""]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
