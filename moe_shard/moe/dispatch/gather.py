"""Dispatch by index: tokens are gathered into slots and slots back into tokens.

The same arrays and the same exchange as `einsum`, without its product over S * E * C. Dispatch and
combine are each other's transpose, so with the seating known in both directions (`Slots`) all four
passes are gathers: nothing is scattered, the sum over k runs in slot order, and the result is the
same bit for bit on every run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_shard.moe.capacity import Slots


def dispatch(x: Float[Array, "B S M"], slots: Slots, num_experts: int) -> Float[Array, "E B C M"]:
    """See `Strategy.dispatch`."""
    by_slot = tokens_to_slots(x, slots)
    batch, all_slots, dim = by_slot.shape
    return by_slot.reshape(batch, num_experts, all_slots // num_experts, dim).swapaxes(0, 1)


def combine(
    y: Float[Array, "E B C M"], weights: Float[Array, "B S K"], slots: Slots
) -> Float[Array, "B S M"]:
    """See `Strategy.combine`."""
    num_experts, batch, capacity, dim = y.shape
    by_slot = y.swapaxes(0, 1).reshape(batch, num_experts * capacity, dim)
    return slots_to_tokens(by_slot, weights, slots)


def _take(x: Float[Array, "B N M"], index: Int[Array, "B P"]) -> Float[Array, "B P M"]:
    """Rows of `x` by index; zero where the index is past the end."""
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="fill", fill_value=0)


@jax.custom_vjp
def tokens_to_slots(x: Float[Array, "B S M"], slots: Slots) -> Float[Array, "B EC M"]:
    """Each token's row in the slots of its choices; empty slots are zero."""
    return _take(x, slots.choice_of_slot // slots.slot_of_choice.shape[-1])


def _tokens_to_slots_fwd(
    x: Float[Array, "B S M"], slots: Slots
) -> tuple[Float[Array, "B EC M"], Slots]:
    return tokens_to_slots(x, slots), slots


def _tokens_to_slots_bwd(
    slots: Slots, dy: Float[Array, "B EC M"]
) -> tuple[Float[Array, "B S M"], None]:
    ones = jnp.ones(slots.slot_of_choice.shape, jnp.float32)
    return _weighted_sum(dy, ones, slots), None


tokens_to_slots.defvjp(_tokens_to_slots_fwd, _tokens_to_slots_bwd)


def _weighted_sum(
    y: Float[Array, "B EC M"], weights: Float[Array, "B S K"], slots: Slots
) -> Float[Array, "B S M"]:
    total = jnp.zeros((), jnp.float32)
    for k in range(weights.shape[-1]):  # unrolled, so that the order of the sum is fixed
        part = _take(y, slots.slot_of_choice[..., k]).astype(jnp.float32)
        total = total + weights[..., k, None] * part
    return total.astype(y.dtype)


@jax.custom_vjp
def slots_to_tokens(
    y: Float[Array, "B EC M"], weights: Float[Array, "B S K"], slots: Slots
) -> Float[Array, "B S M"]:
    """The weighted sum of each token's slots, over k in order; a dropped choice adds nothing."""
    return _weighted_sum(y, weights, slots)


def _slots_to_tokens_fwd(
    y: Float[Array, "B EC M"], weights: Float[Array, "B S K"], slots: Slots
) -> tuple[Float[Array, "B S M"], tuple[Float[Array, "B EC M"], Float[Array, "B S K"], Slots]]:
    return _weighted_sum(y, weights, slots), (y, weights, slots)


def _slots_to_tokens_bwd(
    residuals: tuple[Float[Array, "B EC M"], Float[Array, "B S K"], Slots],
    dout: Float[Array, "B S M"],
) -> tuple[Float[Array, "B EC M"], Float[Array, "B S K"], None]:
    y, weights, slots = residuals
    batch, tokens, k = weights.shape
    weight_of_slot = _take(weights.reshape(batch, tokens * k, 1), slots.choice_of_slot)
    dy = weight_of_slot * _take(dout, slots.choice_of_slot // k).astype(jnp.float32)
    dweights = [
        jnp.sum(
            dout.astype(jnp.float32) * _take(y, slots.slot_of_choice[..., i]).astype(jnp.float32),
            axis=-1,
        )
        for i in range(k)
    ]
    return dy.astype(y.dtype), jnp.stack(dweights, axis=-1), None


slots_to_tokens.defvjp(_slots_to_tokens_fwd, _slots_to_tokens_bwd)
