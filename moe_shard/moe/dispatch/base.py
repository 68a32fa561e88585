"""What every dispatch strategy answers to."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Array, Float, Int

from moe_shard.moe.experts import Experts
from moe_shard.moe.router import Routing


class Strategy(Protocol):
    """A way to bring tokens to their experts and the experts' answers back."""

    def __call__(
        self, x: Float[Array, "B S M"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B S M"], Int[Array, "B"]]:
        """Apply the chosen experts to every token.

        Args:
            x: tokens.
            routing: the router's decision.
            experts: their parameters.

        Returns:
            The weighted sum over each token's experts, summed over k in order and in float32,
            in `x`'s dtype; and how many choices of each batch row were dropped.
        """
        ...
