"""Dispatch with a capacity: every expert has so many slots for a batch row, and so all is static.

The strategies `gather` and `einsum` differ only in how tokens get into slots and out again. The
partitioner makes the exchange, from how `Placement` lays slots out before and after.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_shard.config.moe_config import MoEConfig
from moe_shard.moe.capacity import Slots, assign_slots, assign_slots_in_turn, row_capacity
from moe_shard.moe.dispatch.weighing import on_input
from moe_shard.moe.experts import Experts, batched_product, gated_mlp
from moe_shard.moe.placement import Placement
from moe_shard.moe.record import MoERecord
from moe_shard.moe.router import Routing


class Carrier(Protocol):
    """Tokens to slots and back, row by row, without communication."""

    def dispatch(
        self, x: Float[Array, "B S M"], slots: Slots, num_experts: int
    ) -> Float[Array, "E B C M"]:
        """Copy each token into the slots of its choices; empty slots are zero."""
        ...

    def combine(
        self, y: Float[Array, "E B C M"], weights: Float[Array, "B S K"], slots: Slots
    ) -> Float[Array, "B S M"]:
        """Sum each token's slots, weighted, in float32; a dropped choice adds nothing."""
        ...


class ByCapacity:
    """A strategy with capacity slots.

    Args:
        carrier: `dispatch.gather` or `dispatch.einsum`.
        config: of the layer.
        placement: of its arrays.
    """

    def __init__(self, carrier: Carrier, config: MoEConfig, placement: Placement) -> None:
        self.carrier = carrier
        self.config = config
        self.placement = placement

    def __call__(
        self, x: Float[Array, "B S M"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B S M"], Int[Array, "B"]]:
        """See `Strategy`."""
        self.placement.record(self._record())
        with jax.named_scope("router"):
            slots = self._assign(routing)
            dropped = jnp.sum(~slots.kept(), axis=(1, 2), dtype=jnp.int32)
        with jax.named_scope("dispatch"):
            sent, seats, shares = x, slots, routing.weights
            if self.config.router.routed_score_on_input:
                sent, seats, shares = on_input(x, slots, routing.weights)
            by_row = self.carrier.dispatch(sent, seats, self.config.num_experts)
        with jax.named_scope("experts"):
            weights = self.placement.weights_in_use(experts.weights())
        answers = []
        for part in self._parts(by_row):
            with jax.named_scope("dispatch"):
                expert_input = self.placement.to_experts(part)
            with jax.named_scope("experts"):
                expert_output = gated_mlp(
                    expert_input,
                    weights,
                    product=batched_product,
                    gating=experts.gating,
                    pin_hidden=self.placement.hidden,
                )
            with jax.named_scope("combine"):
                answers.append(self.placement.to_rows(expert_output))
        with jax.named_scope("combine"):
            together = answers[0] if len(answers) == 1 else jnp.concatenate(answers, axis=2)
            return self.carrier.combine(together, shares, slots), dropped

    def _record(self) -> MoERecord:
        placement = self.placement
        if not placement.expert_axes:
            transport = ("none", placement.why_stay)
        elif placement.moves_tokens:
            transport = ("all-to-all", "of slots, between the layouts by row and by expert")
        else:
            transport = ("none", "the batch dim keeps the expert axes: weights are gathered")
        return MoERecord.of(
            self.config,
            transport=transport,
            grouped_product=("batched", "every expert has as many slots"),
            singleton=placement.why_travel,
            equal_pieces="" if placement.moves_tokens else "nothing travels",
        )

    def _assign(self, routing: Routing) -> Slots:
        batch, tokens, k = routing.indices.shape
        capacity = row_capacity(self.config, tokens=tokens)
        if self.config.router.force_load_balance:
            return assign_slots_in_turn(
                batch, tokens, k, num_experts=self.config.num_experts, capacity=capacity
            )
        return assign_slots(
            routing.indices, routing.probs, capacity=capacity, drop=self.config.drop_policy
        )

    def _parts(self, slots: Float[Array, "E B C M"]) -> list[Float[Array, "E B c M"]]:
        """The slots in as many chunks as configured, each to be on the wire by itself.

        Slots are divided, not tokens: what is dropped does not depend on the number of chunks.
        """
        chunks, capacity = self.config.num_moe_token_chunks, slots.shape[2]
        if chunks == 1:
            return [slots]
        ends = [capacity * (chunk + 1) // chunks for chunk in range(chunks)]
        return [part for part in jnp.split(slots, ends[:-1], axis=2) if part.shape[2]]
