"""Say where in a text its tokens stand, in characters."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64


class PlacedTokens(NamedTuple):
    """Hold the tokens of a text.

    Attributes:
        ids: the tokens.
        starts: character of the text at which each begins.
        ends: character before which each ends.
    """

    ids: Int32[np.ndarray, "T"]
    starts: Int64[np.ndarray, "T"]
    ends: Int64[np.ndarray, "T"]

    def overlapping(self, spans: list[list[int]]) -> Bool[np.ndarray, "T"]:
        """Return which tokens have a character within one of some spans, as transformers' mask.

        Args:
            spans: [start, end) of each, in characters.
        """
        found = np.zeros(len(self.ids), bool)
        for start, end in spans:
            found |= (self.ends > start) & (self.starts < end)
        return found


def by_characters(
    text: str,
    ids: Int32[np.ndarray, "T"],
    starts: Int64[np.ndarray, "T"],
    ends: Int64[np.ndarray, "T"],
) -> PlacedTokens:
    """Turn places in the bytes of a text into places in its characters.

    Args:
        text: the text.
        ids: its tokens.
        starts: byte at which each begins, in UTF-8.
        ends: byte before which each ends.
    """
    content = np.frombuffer(text.encode(), np.uint8)
    # A token that is a part of a character has the whole of it.
    number = np.cumsum((content & 0xC0) != 0x80) - 1
    number = np.append(number, number[-1:] + 1 if len(number) else 0)
    last = np.maximum(ends, 1) - 1
    whole = np.where(ends > starts, number[last] + 1, number[starts])
    return PlacedTokens(ids, number[starts].astype(np.int64), whole.astype(np.int64))
