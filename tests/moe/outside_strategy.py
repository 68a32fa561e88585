"""Define a strategy outside the package: capacity slots, exchanged by an explicit all-to-all.

`gather` leaves the exchange to the partitioner; here it is written out inside shard_map, so that
tokens move whatever the flag's value. Nothing in `moe_shard` refers to this file: importing it is
enough (`MOE_SHARD_STRATEGIES=outside_strategy moe-shard train ...`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.config.strategies import register_strategy
from moe_shard.errors import UserError
from moe_shard.moe.dispatch.gather import Gather
from moe_shard.moe.experts import Experts, batched_product, gated_mlp
from moe_shard.moe.placement import EXCHANGED
from moe_shard.moe.record import MoERecord
from moe_shard.moe.router import Routing
from moe_shard.moe.score_on_input import score_on_input
from moe_shard.moe.weights import ExpertWeights


@register_strategy("outside", has_slots=True, always_moves_tokens=True)
class Outside(Gather):
    """Use capacity slots, and exchange them by this file's own all-to-all."""

    def __call__(
        self, x: Float[Array, "B S M"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B S M"], Int[Array, "B"]]:
        """Apply the experts, see `moe_shard.moe.strategy.Strategy`."""
        stored = experts.weights()
        shards = self.placement.shards(x, stored, strategy="outside")
        if shards.length_axes:
            raise UserError(
                "moe_dispatch=outside: a sequence is split over "
                f"{', '.join(shards.length_axes)}, and slots are of whole sequences\n"
                "fix: moe_dispatch=gather, or a context axis of size 1"
            )
        with jax.named_scope("router"):
            slots = self.assign(routing)
            dropped = self.count_dropped(slots, routing)
        with jax.named_scope("dispatch"):
            sent, sent_slots, combine_weights = x, slots, routing.weights
            if self.config.router.routed_score_on_input:
                sent, sent_slots, combine_weights = score_on_input(x, slots, routing.weights)
            by_sequence = self.dispatch(sent, sent_slots, self.config.num_experts)
            parts = [self.placement.by_sequence(part) for part in self.parts(by_sequence)]

        def on_device(
            part: Float[Array, "E b c m"], stored: ExpertWeights
        ) -> Float[Array, "E b c m"]:
            def exchange(array: Array, split: int, concat: int) -> Array:
                if shards.expert_axes:
                    array = jax.lax.all_to_all(
                        array, shards.expert_axes, split_axis=split, concat_axis=concat, tiled=True
                    )
                return checkpoint_name(array, EXCHANGED)

            with jax.named_scope("dispatch"):
                inputs = exchange(part, 0, 1)
            with jax.named_scope("experts"):
                outputs = gated_mlp(
                    shards.whole_embed(inputs),
                    shards.weights_in_use(stored),
                    product=batched_product,
                    gating=experts.gating,
                )
                outputs = shards.summed_hidden(outputs)
            with jax.named_scope("combine"):
                return exchange(outputs, 1, 0)

        batch, _, embed = shards.tokens
        spec = PartitionSpec(None, batch, None, embed)
        weights = ExpertWeights(*shards.weights)  # type: ignore[arg-type]
        mapped = jax.shard_map(
            on_device, mesh=shards.mesh, in_specs=(spec, weights), out_specs=spec
        )
        outputs = [mapped(part, stored) for part in parts]
        with jax.named_scope("combine"):
            return self.combine(jnp.concatenate(outputs, axis=2), combine_weights, slots), dropped

    def record(self, tokens: tuple[int, ...], dtype: DTypeLike) -> MoERecord:
        """Return the record of a call, see `moe_shard.moe.strategy.Strategy`."""
        del tokens, dtype
        moves = bool(self.placement.expert_axes)
        return MoERecord.of(
            self.config,
            transport=("all-to-all", "of slots, in shard_map")
            if moves
            else ("none", self.placement.why_no_exchange),
            grouped_product=("batched", "every expert has as many slots"),
            singleton=self.placement.why_exchange,
            equal_pieces="" if moves else "nothing is exchanged",
        )
