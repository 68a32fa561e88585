"""Skip an update that is not finite, inside the compiled step: its state stays as it was.

The host is not asked: whether a step is skipped is one flag that every device computes, and each
array of the state is chosen by it where it is written.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from moe_shard.models.params import Params


def change(before: Params, after: Params) -> Params:
    """Return what an update changed, in float32.

    Its norm is not finite where an element of either is not, nor where the change is beyond 1.8e19,
    whose square float32 does not hold: no weights survive that.

    Args:
        before: the parameters.
        after: the same, updated.
    """

    def difference(old: Float[Array, "*D"], new: Float[Array, "*D"]) -> Float[Array, "*D"]:
        return new.astype(jnp.float32) - old.astype(jnp.float32)

    return jax.tree.map(difference, before, after)


def all_finite(*values: Float[Array, ""]) -> Bool[Array, ""]:
    """Return whether all of some scalars are finite."""
    return jnp.all(jnp.isfinite(jnp.stack(values)))


def choose_params(accept: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Return a tree of arrays as updated, or as it was."""
    return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)


def choose_opt_state(accept: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Return the optimizer's state as updated, or as it was but for the schedule's count.

    The learning rate follows the number of the step, whatever became of the steps before. Adam's
    own count, by which it corrects young moments, is of updates that were made.

    Args:
        accept: whether the update is made.
        new: optax's state after it.
        old: the same before it.
    """

    def counts_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState | optax.FactoredState)

    def chosen(after: Any, before: Any) -> Any:
        if counts_schedule(after):
            return choose_params(accept, after, before)._replace(count=after.count)
        return jnp.where(accept, after, before)

    return jax.tree.map(chosen, new, old, is_leaf=counts_schedule)
