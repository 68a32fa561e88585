"""Hold the experts' weights as arrays: gate and up separate, or fused, or up alone."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class ExpertWeights(NamedTuple):
    """Hold the weights of the experts on a device.

    Attributes:
        inward: gate and up, [E M H] each; or, fused, the one array [E M 2 H] of both; or, without a
            gate, up.
        down: the second projection.
        inward_bias: their biases, [E H] each, or of both, [E 2 H]; empty where there are none.
        down_bias: the second projection's bias; None where there is none.
        inward_lora: adapters of gate and up, A [E M R] of both and B [E R H] of each; empty where
            there are none.
        down_lora: adapter of the second projection, A [E H R] and B [E R M]; empty likewise.
    """

    inward: tuple[Float[Array, "E M *GH"], ...]
    down: Float[Array, "E H M"]
    inward_bias: tuple[Float[Array, "E *GH"], ...] = ()
    down_bias: Float[Array, "E M"] | None = None
    inward_lora: tuple[Float[Array, "E _ _"], ...] = ()
    down_lora: tuple[Float[Array, "E _ _"], ...] = ()

    @property
    def fused(self) -> bool:
        """Return whether gate and up are one array, and so one product."""
        return self.inward[0].ndim == 4

    @property
    def adapted(self) -> bool:
        """Return whether a weight has an adapter."""
        return bool(self.inward_lora or self.down_lora)


def fuse(gate: Float[Array, "*E H"], up: Float[Array, "*E H"]) -> Float[Array, "*E 2 H"]:
    """Stack gate and up, weights or biases, in one array; `unfuse` is the exact inverse."""
    return jnp.stack([gate, up], axis=-2)


def unfuse(
    gate_up: Float[Array, "*E 2 H"],
) -> tuple[Float[Array, "*E H"], Float[Array, "*E H"]]:
    """Split a fused array into gate and up."""
    return gate_up[..., 0, :], gate_up[..., 1, :]
