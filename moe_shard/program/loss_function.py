"""Say what functions of a loss are called with, and count what they are means over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_shard.config.schema import Config
from moe_shard.layers.cache import PADDING
from moe_shard.layers.loss import IGNORED
from moe_shard.models.params import Params
from moe_shard.program.loss_parts import Losses

Microbatch = dict[str, Int[Array, "R S"]]
GradFn = Callable[[Params, Microbatch], tuple[Float[Array, ""], Losses, Params]]


class LossFn(Protocol):
    """Compute the loss of a microbatch and its parts.

    `targets` is the mean number of targets of the update's microbatches, where some tokens have
    none; None: each has one.
    """

    def __call__(
        self, params: Params, batch: Microbatch, targets: Float[Array, ""] | None = None
    ) -> tuple[Float[Array, ""], Losses]:
        """Compute them."""


class CountedGradFn(Protocol):
    """Compute the loss of a microbatch, its parts and its gradients; see `LossFn`."""

    def __call__(
        self, params: Params, batch: Microbatch, targets: Float[Array, ""] | None = None
    ) -> tuple[Float[Array, ""], Losses, Params]:
        """Compute them."""


def count_targets(config: Config, batch: dict[str, Int[Array, "A R S"]]) -> Float[Array, ""] | None:
    """Count the targets of a microbatch in the mean, so that each weighs the same in the update.

    Args:
        config: whether some tokens have no target.
        batch: all microbatches.

    Returns:
        At least a part of one, so that a batch without targets has the loss 0; None where every
        token has a target.
    """
    if not config.data.use_sft:
        return None
    with jax.named_scope("loss"):
        counted = jnp.sum((batch["targets"] != IGNORED).astype(jnp.float32))
        return jnp.maximum(counted, 1) / batch["targets"].shape[0]


def real_tokens(config: Config, batch: Microbatch) -> Bool[Array, "R S"] | None:
    """Return which tokens are not padding; None where there is none.

    Args:
        config: whether sequences are filled up.
        batch: a microbatch.
    """
    return batch["segment_ids"] != PADDING if config.data.use_sft else None
