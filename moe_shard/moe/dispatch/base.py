"""What every dispatch strategy answers to."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Array, Float

from moe_shard.moe.capacity import Slots


class Strategy(Protocol):
    """A way to carry tokens to expert slots and back, row by row, without communication.

    Both arrays with an expert dim are laid out by batch row; the exchange between devices is made
    by the layer, between `dispatch` and the experts and between the experts and `combine`.
    """

    def dispatch(
        self, x: Float[Array, "B S M"], slots: Slots, num_experts: int
    ) -> Float[Array, "E B C M"]:
        """Copy each token into the slots of its choices; empty slots are zero."""
        ...

    def combine(
        self,
        y: Float[Array, "E B C M"],
        weights: Float[Array, "B S K"],
        slots: Slots,
    ) -> Float[Array, "B S M"]:
        """Sum each token's slots, weighted, in float32; a dropped choice adds nothing."""
        ...
