"""Dispatch without a capacity: each choice is a token copy, sent to its expert and back.

Sort a device's choices by expert, exchange counts within the expert group, exchange the copies,
apply the experts, exchange the outputs back, combine: `Ragged.exchanged` and `Ragged.one_round` are
these steps in order, inside shard_map.

Shapes are static: one round holds a limited number of copies, somewhat more than a balanced load
has. If the routing exceeds the limit anywhere, further, smaller rounds follow, in a loop that
otherwise does not run (`moe_shard.moe.exchange.overflow`), so the result is exact whatever the
routing. With `ragged_buffer_factor` there is one round instead, and the choices beyond it are
dropped and counted. The sum over a token's experts runs over k in order, after all rounds, so that
a result does not depend on the round that a copy was in.

There are two fast paths: without an expert group nothing is exchanged, and with forced balance the
routing is known when the program is traced. Dims as in `moe_shard.moe.exchange`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moe_shard.config.model_config import GatingConfig
from moe_shard.config.moe_config import MoEConfig
from moe_shard.config.strategies import register_strategy
from moe_shard.errors import UserError
from moe_shard.moe.exchange.equal_pieces import EqualPieces
from moe_shard.moe.exchange.overflow import (
    ChunkChoices,
    ChunkRouting,
    Chunks,
    Rounds,
    all_rounds,
    combine,
    combine_chunks,
    name_exchanged,
)
from moe_shard.moe.exchange.padding import by_expert_index, compact, gather_or_zero, pad
from moe_shard.moe.exchange.ragged_plan import RaggedPlan, RoundSizes, plan_ragged
from moe_shard.moe.exchange.segments import (
    Counts,
    RoundLayout,
    clip_to_capacity,
    clip_to_round,
    lay_out_round,
)
from moe_shard.moe.exchange.sorting import (
    SortedChoices,
    align_groups,
    sort_by_expert,
    sort_known_choices,
)
from moe_shard.moe.experts import Experts, FusedMLP, Product, batched_product, gated_mlp
from moe_shard.moe.grouped import can_fuse, grouped_mlp, grouped_product
from moe_shard.moe.grouped.biases import of_groups
from moe_shard.moe.grouped.gated import GroupedMLP
from moe_shard.moe.placement import EXCHANGED, Placement
from moe_shard.moe.record import MoERecord
from moe_shard.moe.router import ROUTING, Routing
from moe_shard.moe.score_on_input import score_on_input
from moe_shard.moe.shards import Shards
from moe_shard.moe.slot_gathers import tokens_to_slots
from moe_shard.moe.slots import Slots
from moe_shard.moe.weights import ExpertWeights
from moe_shard.sharding.varying import vary_alike, zeros

Local = tuple[Float[Array, "b s m"], Int[Array, "b"]]
"""The layer's output on one device, and how many choices of each sequence were dropped."""


@register_strategy(
    "ragged",
    has_slots=False,
    always_moves_tokens=True,
    keys=("ragged_transport", "ragged_buffer_factor", "grouped_product"),
)
class Ragged:
    """Send each choice as a token copy to its expert and back; see the module.

    Args:
        config: the layer's configuration.
        placement: the placement of the layer's arrays.
        check_vma: whether JAX checks that values declared equal on devices are equal.

    Raises:
        UserError: the transport does not run on these devices.
    """

    def __init__(self, config: MoEConfig, placement: Placement, *, check_vma: bool = True) -> None:
        self.config = config
        self.placement = placement
        self.check_vma = check_vma
        if config.ragged_transport == "ragged" and placement.sharding.platform == "cpu":
            raise UserError(
                "ragged_transport=ragged: XLA has no ragged-all-to-all on CPU\n"
                "fix: ragged_transport=auto, which sends padded pieces there"
            )

    def __call__(
        self, x: Float[Array, "B S M"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B S M"], Int[Array, "B"]]:
        """Apply the experts, see `Strategy`."""
        stored = experts.weights()
        shards = self.placement.shards(x, stored, strategy=self.config.moe_dispatch)
        plan = plan_ragged(self.config, self.placement, x.shape, experts.dtype)
        platform = self.placement.sharding.platform
        padded = routing.real is not None
        device = _Device(self.config, shards, plan, experts.gating, platform, padded)
        local: Callable[..., Local] = device.exchanged
        if plan.exchange == "equal":
            local = device.in_equal_pieces
        elif plan.exchange == "local":
            local = device.in_place
        on_shards = shards.map(local, check_vma=self.check_vma)
        return on_shards(x, routing.indices, routing.weights, stored)

    def record(self, tokens: tuple[int, ...], dtype: DTypeLike) -> MoERecord:
        """Return the record of a call, see `Strategy`."""
        plan = plan_ragged(self.config, self.placement, tokens, dtype)
        return plan.record(self.config, self.placement)


@dataclass(frozen=True, eq=False)
class _Device:
    """Apply the layer to the tokens of one device, inside shard_map.

    Attributes:
        config: the layer's configuration.
        shards: how the layer's arrays are split.
        plan: what was decided for these shapes.
        gating: activation, clamps, offset and biases between the experts' products.
        platform: platform of the devices.
        padded: whether some choices are of no expert.
    """

    config: MoEConfig
    shards: Shards
    plan: RaggedPlan
    gating: GatingConfig
    platform: str
    padded: bool

    def exchanged(
        self,
        x: Float[Array, "b s m"],
        indices: Int[Array, "b s K"],
        weights: Float[Array, "b s K"],
        stored: ExpertWeights,
    ) -> Local:
        """Send token copies to their experts' devices and the outputs back."""
        with jax.named_scope("experts"):
            in_use = self.shards.weights_in_use(stored)
        tokens, chosen, scales = map(self._chunks, (x, indices, weights))
        with jax.named_scope("dispatch"):
            sorted_choices = [self._sort(i, each) for i, each in enumerate(chosen)]
            counts = self._exchange_counts(sorted_choices)
            tokens, sent_slots, scales = self._sent(tokens, sorted_choices, scales)
        each = zip(sent_slots, sorted_choices, counts, strict=True)
        routings = tuple(ChunkRouting(slots, order.slots, count) for slots, order, count in each)
        first = self.plan.round_sizes(self.shards.expert_axes, self.plan.first)
        if self.plan.further is not None:
            further = self.plan.round_sizes(self.shards.expert_axes, self.plan.further)
            rounds = Rounds(first, further, self.one_round)
            y = all_rounds(rounds, tokens, in_use, routings, scales)
            return self._joined(y, x), jnp.zeros(x.shape[:1], jnp.int32)
        clip = clip_to_capacity if self.plan.drops else clip_to_round
        outputs = []
        for chunk, routing in zip(tokens, routings, strict=True):
            size, sent_before = clip(routing.counts, first.limit), jnp.zeros_like(routing.counts)
            outputs.append(self.one_round(first, chunk, in_use, routing, size, sent_before))
        y = combine_chunks(name_exchanged(tuple(outputs)), scales, routings)
        if not self.plan.drops:
            return self._joined(y, x), jnp.zeros(x.shape[:1], jnp.int32)
        return self._joined(y, x), self._count_dropped(sorted_choices, chosen, counts, indices)

    def one_round(
        self,
        sizes: RoundSizes,
        tokens: Float[Array, "T M"],
        weights: ExpertWeights,
        routing: ChunkRouting,
        size: Counts,
        sent_before: Counts,
    ) -> Float[Array, "N M"]:
        """Make one round, see `overflow.OneRound`."""
        with jax.named_scope("dispatch"):
            layout = lay_out_round(
                routing.counts, size, sent_before, alignment=self.plan.product.alignment
            )
            copies = tokens_to_slots(tokens[None], routing.sent_slots)[0]
            copies = checkpoint_name(send(sizes, copies, layout), EXCHANGED)
        with jax.named_scope("experts"):
            me = jax.lax.axis_index(sizes.axes)
            outputs = self._grouped(weights, copies, layout.group_sizes[me])
        with jax.named_scope("combine"):
            return send_back(sizes, outputs, layout)

    def in_place(
        self,
        x: Float[Array, "b s m"],
        indices: Int[Array, "b s K"],
        weights: Float[Array, "b s K"],
        stored: ExpertWeights,
    ) -> Local:
        """Apply the experts without an exchange: every device has all of them."""
        with jax.named_scope("experts"):
            in_use = self.shards.weights_in_use(stored)
        tokens, chosen, scales = map(self._chunks, (x, indices, weights))
        y = []
        for i, chunk in enumerate(tokens):
            with jax.named_scope("dispatch"):
                slots, sizes = align_groups(
                    self._sort(i, chosen[i]),
                    chosen[i],
                    alignment=self.plan.product.alignment,
                    length=self.plan.buffer(self.plan.load.copies),
                )
                sent, sent_slots, scale = self._copies(chunk, slots, scales[i])
                copies = tokens_to_slots(sent[None], sent_slots)[0]
            with jax.named_scope("experts"):
                outputs = self._grouped(in_use, copies, sizes)
            with jax.named_scope("combine"):
                y.append(combine(outputs, scale, slots))
        dropped = jnp.zeros(x.shape[:1], jnp.int32)
        return self._joined(tuple(y), x), dropped

    def in_equal_pieces(
        self,
        x: Float[Array, "b s m"],
        indices: Int[Array, "b s K"],
        weights: Float[Array, "b s K"],
        stored: ExpertWeights,
    ) -> Local:
        """Exchange pieces of equal size, for forced balance that divides evenly."""
        with jax.named_scope("experts"):
            in_use = self.shards.weights_in_use(stored)
        tokens, _, scales = map(self._chunks, (x, indices, weights))
        exchange = EqualPieces(
            self.shards.expert_axes,
            self.plan.load.devices,
            self.plan.load.experts,
            partial(self._experts, batched_product),
            self.config.router.routed_score_on_input,
        )
        each = zip(tokens, scales, strict=True)
        y = tuple(exchange.apply(chunk, scale, in_use) for chunk, scale in each)
        dropped = jnp.zeros(x.shape[:1], jnp.int32)
        return self._joined(y, x), dropped

    def _chunks(self, array: Array) -> tuple[Array, ...]:
        """Flatten sequences, and split into as many chunks as configured."""
        flat = array.reshape(-1, array.shape[-1])
        return tuple(jnp.split(flat, self.config.num_moe_token_chunks))

    def _joined(self, y: Chunks, x: Float[Array, "b s m"]) -> Float[Array, "b s m"]:
        return jnp.concatenate(y).reshape(x.shape)

    def _sort(self, chunk: int, chosen: Int[Array, "T K"]) -> SortedChoices:
        if self.plan.known is not None:
            return sort_known_choices(self.plan.known[chunk], self.config.num_experts)
        return sort_by_expert(chosen, self.config.num_experts, padded=self.padded)

    def _exchange_counts(self, sorted_choices: list[SortedChoices]) -> tuple[Counts, ...]:
        """Gather how much every device of the group sends to every expert, in each chunk."""
        load = self.plan.load
        mine = jnp.stack([each.counts for each in sorted_choices])
        if self.plan.known is not None:  # the same on every device
            every = jnp.broadcast_to(mine, (load.devices, *mine.shape))
        else:
            every = jax.lax.all_gather(mine, self.shards.expert_axes)
            every = checkpoint_name(every, ROUTING)
        shape = (load.devices, len(sorted_choices), load.devices, load.experts)
        by_chunk = every.reshape(shape).swapaxes(0, 1)
        return tuple(by_chunk[chunk] for chunk in range(len(sorted_choices)))

    def _sent(
        self, tokens: Chunks, sorted_choices: list[SortedChoices], scales: Chunks
    ) -> tuple[Chunks, tuple[Slots, ...], Chunks]:
        """Return what is sent of every chunk, its slots, and the combine weights still to apply."""
        each = zip(tokens, sorted_choices, scales, strict=True)
        sent = [self._copies(chunk, order.slots, scale) for chunk, order, scale in each]
        return tuple(zip(*sent, strict=True))  # type: ignore[return-value]

    def _copies(
        self, tokens: Float[Array, "T m"], slots: Slots, scale: Float[Array, "T K"]
    ) -> tuple[Float[Array, "N m"], Slots, Float[Array, "T K"]]:
        if not self.config.router.routed_score_on_input:
            return tokens, slots, scale
        tokens, scale = vary_alike(tokens, scale)
        sent, sent_slots, left = score_on_input(tokens[None], slots, scale[None])
        return sent[0], sent_slots, left[0]

    def _count_dropped(
        self,
        sorted_choices: list[SortedChoices],
        chosen: ChunkChoices,
        counts: tuple[Counts, ...],
        indices: Int[Array, "b s K"],
    ) -> Int[Array, "b"]:
        """Count the choices of each sequence that the single round does not hold."""
        with jax.named_scope("router"):
            me = jax.lax.axis_index(self.shards.expert_axes)
            beyond: list[Bool[Array, "T K"]] = []
            for count, order, choice in zip(counts, sorted_choices, chosen, strict=True):
                held = clip_to_capacity(count, self.plan.first)[me].reshape(-1)
                is_sent = choice < self.config.num_experts
                beyond.append(is_sent & (order.position >= held[choice]))
            lost = jnp.concatenate(beyond)
        dropped = jnp.sum(lost.reshape(indices.shape), axis=(1, 2), dtype=jnp.int32)
        if self.shards.length_axes:
            dropped = jax.lax.psum(dropped, self.shards.length_axes)
        return dropped

    def _grouped(
        self, weights: ExpertWeights, copies: Float[Array, "R m"], sizes: Int[Array, "L"]
    ) -> Float[Array, "R m"]:
        """Apply the experts to copies that are sorted by expert, in groups of these sizes."""

        def product(
            x: Float[Array, "R A"],
            w: Float[Array, "L A *P"],
            bias: Float[Array, "L *P"] | None = None,
        ) -> Float[Array, "R *P"]:
            flat = w.reshape(*w.shape[:2], -1)
            y = grouped_product(x, flat, sizes, using=self.plan.product, platform=self.platform)
            y = y.reshape(-1, *w.shape[2:])
            return y if bias is None else y + of_groups(bias, sizes, rows=y.shape[0])

        def together(x: Float[Array, "R M"], weights: ExpertWeights) -> Float[Array, "R M"]:
            gate, up = weights.inward
            each = GroupedMLP(gate, up, weights.down, weights.inward_bias)
            y = grouped_mlp(
                x,
                each,
                sizes,
                gating=self.gating,
                using=self.plan.product,
                platform=self.platform,
            )
            bias = weights.down_bias
            return y if bias is None else y + of_groups(bias, sizes, rows=y.shape[0])

        fused_mlp = together if can_fuse(self.plan.product, self.gating) else None
        return self._experts(product, weights, copies, fused_mlp)

    def _experts(
        self,
        product: Product,
        weights: ExpertWeights,
        copies: Float[Array, "*R m"],
        fused_mlp: FusedMLP | None = None,
    ) -> Float[Array, "*R m"]:
        copies = self.shards.whole_embed(copies)
        y = gated_mlp(copies, weights, product=product, gating=self.gating, fused_mlp=fused_mlp)
        return self.shards.summed_hidden(y)


# The exchange of one round and the exchange back are each other's transpose, so one pair of
# functions is enough for both passes: nothing is ever scattered, and every exchange is made once
# forward and once backward.


def _send(
    sizes: RoundSizes, copies: Float[Array, "N M"], layout: RoundLayout
) -> Float[Array, "R M"]:
    """Exchange a round of copies, sorted by expert, to the experts; padding is zero."""
    me = jax.lax.axis_index(sizes.axes)
    if not sizes.padded:
        return jax.lax.ragged_all_to_all(
            copies,
            zeros((sizes.buffer, copies.shape[1]), copies.dtype, copies),
            input_offsets=layout.sent_from[me].reshape(-1),
            send_sizes=layout.size[me].reshape(-1),
            output_offsets=layout.put_at[me].reshape(-1),
            recv_sizes=layout.size[:, me].reshape(-1),
            axis_name=sizes.axes,
        )
    assert sizes.limit.piece is not None
    pieces = pad(copies, layout.sent_from[me].reshape(-1), layout.size[me], sizes.limit.piece)
    pieces = jax.lax.all_to_all(pieces, sizes.axes, split_axis=0, concat_axis=0, tiled=True)
    index = by_expert_index(
        layout.put_at[:, me], layout.size[:, me], sizes.limit.piece, sizes.buffer
    )
    return gather_or_zero(pieces, index)


def _send_back(
    sizes: RoundSizes, outputs: Float[Array, "R M"], layout: RoundLayout
) -> Float[Array, "N M"]:
    """Exchange outputs of a round back to where its copies came from; other places are zero."""
    into = zeros((sizes.copies, outputs.shape[1]), outputs.dtype, outputs)
    me = jax.lax.axis_index(sizes.axes)
    if not sizes.padded:
        return jax.lax.ragged_all_to_all(
            outputs,
            into,
            input_offsets=layout.put_at[:, me].reshape(-1),
            send_sizes=layout.size[:, me].reshape(-1),
            output_offsets=layout.sent_from[:, me].reshape(-1),
            recv_sizes=layout.size[me].reshape(-1),
            axis_name=sizes.axes,
        )
    assert sizes.limit.piece is not None
    pieces = pad(outputs, layout.put_at[:, me].reshape(-1), layout.size[:, me], sizes.limit.piece)
    pieces = jax.lax.all_to_all(pieces, sizes.axes, split_axis=0, concat_axis=0, tiled=True)
    start = layout.sent_from[me].reshape(-1)
    return compact(pieces, start, layout.size[me], sizes.limit.piece, into)


send = jax.custom_vjp(_send, nondiff_argnums=(0,))
send_back = jax.custom_vjp(_send_back, nondiff_argnums=(0,))
send.defvjp(
    lambda sizes, copies, layout: (_send(sizes, copies, layout), layout),
    lambda sizes, layout, gradient: (_send_back(sizes, gradient, layout), None),
)
send_back.defvjp(
    lambda sizes, outputs, layout: (_send_back(sizes, outputs, layout), layout),
    lambda sizes, layout, gradient: (_send(sizes, gradient, layout), None),
)
