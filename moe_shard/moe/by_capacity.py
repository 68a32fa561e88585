"""Dispatch with a capacity: each expert has a fixed number of slots for a sequence.

So all shapes are static. The strategies `gather` and `einsum` differ only in how tokens get into
slots and out again. The partitioner makes the exchange, from how `Placement` lays slots out before
and after it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.config.moe_config import MoEConfig
from moe_shard.errors import UserError
from moe_shard.moe.capacity import sequence_capacity
from moe_shard.moe.experts import Experts, batched_product, gated_mlp
from moe_shard.moe.placement import Placement
from moe_shard.moe.record import MoERecord
from moe_shard.moe.router import Routing
from moe_shard.moe.score_on_input import score_on_input
from moe_shard.moe.slots import Slots, assign_slots, assign_slots_round_robin


class ByCapacity(ABC):
    """Share what strategies with capacity slots have in common; subclasses fill and read slots.

    Args:
        config: the layer's configuration.
        placement: the placement of the layer's arrays.
    """

    def __init__(self, config: MoEConfig, placement: Placement) -> None:
        self.config = config
        self.placement = placement

    @abstractmethod
    def dispatch(
        self, x: Float[Array, "B S M"], slots: Slots, num_experts: int
    ) -> Float[Array, "E B C M"]:
        """Copy each token into the slots of its choices; empty slots are zero.

        Sequence by sequence, without communication.
        """

    @abstractmethod
    def combine(
        self, y: Float[Array, "E B C M"], weights: Float[Array, "B S K"], slots: Slots
    ) -> Float[Array, "B S M"]:
        """Sum each token's slots, weighted, in float32; a dropped choice adds nothing."""

    def __call__(
        self, x: Float[Array, "B S M"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B S M"], Int[Array, "B"]]:
        """Apply the experts, see `Strategy`."""
        with jax.named_scope("router"):
            slots = self.assign(routing)
            dropped = self.count_dropped(slots, routing)
        with jax.named_scope("dispatch"):
            sent, sent_slots, combine_weights = x, slots, routing.weights
            if self.config.router.routed_score_on_input:
                sent, sent_slots, combine_weights = score_on_input(x, slots, routing.weights)
            by_sequence = self.dispatch(sent, sent_slots, self.config.num_experts)
            self._check_dispatched(by_sequence, x.shape[0], slots, x.shape[2])
        with jax.named_scope("experts"):
            weights = self.placement.weights_in_use(experts.weights())
        outputs = []
        for part in self.parts(by_sequence):
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
                outputs.append(self.placement.to_sequences(expert_output))
        with jax.named_scope("combine"):
            together = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)
            return self.combine(together, combine_weights, slots), dropped

    def record(self, tokens: tuple[int, ...], dtype: DTypeLike) -> MoERecord:
        """Return the record of a call, see `Strategy`; the same for all shapes."""
        del tokens, dtype
        placement = self.placement
        if not placement.expert_axes:
            transport = ("none", placement.why_no_exchange)
        elif placement.moves_tokens:
            transport = ("all-to-all", "of slots, between the layouts by sequence and by expert")
        else:
            transport = ("none", "the batch dim keeps the expert axes: weights are gathered")
        return MoERecord.of(
            self.config,
            transport=transport,
            grouped_product=("batched", "every expert has as many slots"),
            singleton=placement.why_exchange,
            equal_pieces="" if placement.moves_tokens else "nothing is exchanged",
        )

    def assign(self, routing: Routing) -> Slots:
        """Assign the choices of each sequence to slots."""
        batch, tokens, k = routing.indices.shape
        capacity = sequence_capacity(self.config, tokens=tokens)
        if self.config.router.force_load_balance:
            return assign_slots_round_robin(
                batch, tokens, k, num_experts=self.config.num_experts, capacity=capacity
            )
        return assign_slots(
            routing.indices, routing.probs, capacity=capacity, drop=self.config.drop_policy
        )

    def count_dropped(self, slots: Slots, routing: Routing) -> Int[Array, "B"]:
        """Count the choices of each sequence without a slot, those of padding excepted."""
        dropped = ~slots.has_slot()
        if routing.real is not None:
            dropped &= routing.real[..., None]
        return jnp.sum(dropped, axis=(1, 2), dtype=jnp.int32)

    def _check_dispatched(self, found: Array, batch: int, slots: Slots, dim: int) -> None:
        """Check that what a subclass's `dispatch` returned is [E B C M].

        Raises:
            UserError: it has another shape.
        """
        experts = self.config.num_experts
        wanted = (experts, batch, slots.choice_of_slot.shape[1] // experts, dim)
        if found.shape != wanted:
            raise UserError(
                f"moe_dispatch={self.config.moe_dispatch}: dispatch returned {[*found.shape]}\n"
                f"fix: {[*wanted]}: experts, sequences, slots, model dim"
            )

    def parts(self, slots: Float[Array, "E B C M"]) -> list[Float[Array, "E B c M"]]:
        """Split the slots into as many chunks as configured, each exchanged by itself.

        Slots are divided, not tokens: what is dropped does not depend on the number of chunks.
        """
        chunks, capacity = self.config.num_moe_token_chunks, slots.shape[2]
        if chunks == 1:
            return [slots]
        ends = [capacity * (chunk + 1) // chunks for chunk in range(chunks)]
        return [part for part in jnp.split(slots, ends[:-1], axis=2) if part.shape[2]]
