"""The experts' weights as arrays: gate and up apart, or as one."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class ExpertWeights(NamedTuple):
    """The weights of the experts at hand.

    Attributes:
        inward: gate and up, [E M H] each; or, fused, the one array [E M 2 H] of both.
        down: the way out.
    """

    inward: tuple[Float[Array, "E M *GH"], ...]
    down: Float[Array, "E H M"]

    @property
    def fused(self) -> bool:
        """Whether gate and up are one array, and so one product."""
        return len(self.inward) == 1


def fuse(gate: Float[Array, "*E M H"], up: Float[Array, "*E M H"]) -> Float[Array, "*E M 2 H"]:
    """Gate and up as the one array that `gate_up` holds; `unfuse` is the exact inverse."""
    return jnp.stack([gate, up], axis=-2)


def unfuse(
    gate_up: Float[Array, "*E M 2 H"],
) -> tuple[Float[Array, "*E M H"], Float[Array, "*E M H"]]:
    """Gate and up of a fused array."""
    return gate_up[..., 0, :], gate_up[..., 1, :]
