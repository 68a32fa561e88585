"""Find steps whose loss or gradient norm is far above those before, inside the compiled step.

Source: MaxText's skip_step_on_spikes, after OLMo-core's SkipStepOptimizer: a step is skipped where
its loss or gradient norm exceeds the mean of the last `skip_step_interval` ones by more than
`skip_step_scaling_factor` standard deviations (of a sample, over N - 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class History(NamedTuple):
    """Hold what the last steps gave; N is `skip_step_interval`.

    Attributes:
        losses: of the last N steps, the oldest overwritten first.
        grad_norms: the same.
        seen: number of steps written so far.
    """

    losses: Float[Array, "N"]
    grad_norms: Float[Array, "N"]
    seen: Int[Array, ""]


class WithHistory(NamedTuple):
    """Hold the optimizer's state and what spikes are found by.

    Attributes:
        inner: optax's state.
        history: see `History`.
    """

    inner: Any
    history: History


def no_history(interval: int) -> History:
    """Return a history of no steps."""
    zeros = jnp.zeros(interval, jnp.float32)
    return History(zeros, zeros, jnp.zeros((), jnp.int32))


def is_spike(
    history: History, loss: Float[Array, ""], grad_norm: Float[Array, ""], *, factor: float
) -> Bool[Array, ""]:
    """Return whether a step is a spike; none is while fewer than half of N steps are known.

    Args:
        history: the steps before.
        loss: of this step.
        grad_norm: of this step.
        factor: standard deviations above the mean.
    """
    interval = history.losses.size
    above = _above(history.losses, history.seen, loss, factor) | _above(
        history.grad_norms, history.seen, grad_norm, factor
    )
    return above & (history.seen + 1 >= max(2, interval // 2))


def _above(
    values: Float[Array, "N"], seen: Int[Array, ""], value: Float[Array, ""], factor: float
) -> Bool[Array, ""]:
    known = jnp.minimum(seen, values.size)
    here = jnp.arange(values.size) < known
    mean = jnp.sum(jnp.where(here, values, 0)) / jnp.maximum(known, 1)
    squares = jnp.sum(jnp.where(here, jnp.square(values - mean), 0))
    return value - mean > factor * jnp.sqrt(squares / jnp.maximum(known - 1, 1))


def remember(
    history: History,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    *,
    finite: Bool[Array, ""],
) -> History:
    """Return the history with one more step.

    A spike is remembered, so that a lasting rise becomes the new level. A step that is not finite
    is not: no later one could be compared with it.
    """
    at = history.seen % history.losses.size
    return History(
        history.losses.at[at].set(jnp.where(finite, loss, history.losses[at])),
        history.grad_norms.at[at].set(jnp.where(finite, grad_norm, history.grad_norms[at])),
        history.seen + finite.astype(jnp.int32),
    )
