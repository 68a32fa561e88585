"""Move tokens to slots and back by index, with gradients that are gathers too.

The two functions are each other's transpose, so with the assignment known in both directions
(`Slots`) all four passes are gathers: nothing is scattered, the sum over k runs in slot order, and
the result is the same bit for bit on every run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_shard.moe.slots import Slots


def _gather(x: Float[Array, "B N M"], index: Int[Array, "B P"]) -> Float[Array, "B P M"]:
    """Gather along the second dim; zero where the index is past the end."""
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="fill", fill_value=0)


@jax.custom_vjp
def tokens_to_slots(x: Float[Array, "B S M"], slots: Slots) -> Float[Array, "B EC M"]:
    """Copy each token into the slots of its choices; empty slots are zero."""
    return _gather(x, slots.choice_of_slot // slots.slot_of_choice.shape[-1])


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
        part = _gather(y, slots.slot_of_choice[..., k]).astype(jnp.float32)
        total = total + weights[..., k, None] * part
    return total.astype(y.dtype)


@jax.custom_vjp
def slots_to_tokens(
    y: Float[Array, "B EC M"], weights: Float[Array, "B S K"], slots: Slots
) -> Float[Array, "B S M"]:
    """Sum each token's slots, weighted, over k in order; a dropped choice adds nothing."""
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
    weight_of_slot = _gather(weights.reshape(batch, tokens * k, 1), slots.choice_of_slot)
    dy = weight_of_slot * _gather(dout, slots.choice_of_slot // k).astype(jnp.float32)
    dweights = [
        jnp.sum(
            dout.astype(jnp.float32) * _gather(y, slots.slot_of_choice[..., i]).astype(jnp.float32),
            axis=-1,
        )
        for i in range(k)
    ]
    return dy.astype(y.dtype), jnp.stack(dweights, axis=-1), None


slots_to_tokens.defvjp(_slots_to_tokens_fwd, _slots_to_tokens_bwd)
