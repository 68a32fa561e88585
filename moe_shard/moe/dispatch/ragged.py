"""Dropless dispatch: every choice is a row that travels to its expert's device and back.

Each device sorts its choices by expert, tells its expert group how many it has for each (the one
exchange of counts), and sends. What is static is a bound on the rows of one round, somewhat above
a balanced load. A router that exceeds it somewhere costs further, smaller rounds, in a loop that
otherwise does not run: the result is exact whatever the routing. A person who would rather drop
sets `ragged_buffer_factor`; then there is one round, and what is beyond it is counted.

The sum over a token's experts runs over k in order, after all rounds, so that a result does not
depend on how its rows travelled. There are two shorter ways: without an expert group nothing
travels, and with forced balance nothing has to be found out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moe_shard.config.model_config import GatingConfig
from moe_shard.config.moe_config import MoEConfig
from moe_shard.errors import UserError
from moe_shard.moe.capacity import Slots
from moe_shard.moe.dispatch.forced import EqualPieces
from moe_shard.moe.dispatch.gather import tokens_to_slots
from moe_shard.moe.dispatch.plan import Bound, Counts, aligned_rows, kept
from moe_shard.moe.dispatch.rounds import ChunkChoices, Chunks, Rounds, Routes, combined
from moe_shard.moe.dispatch.seating import Seating, at_aligned_groups, seat, seat_known
from moe_shard.moe.dispatch.transport import PaddedTransport, RaggedTransport, Transport
from moe_shard.moe.dispatch.weighing import on_input
from moe_shard.moe.experts import Experts, Product, batched_product, gated_mlp
from moe_shard.moe.grouped import GroupedProduct, choose, grouped_product
from moe_shard.moe.grouped.biases import of_groups
from moe_shard.moe.placement import Placement
from moe_shard.moe.record import MoERecord
from moe_shard.moe.router import ROUTING, Routing, round_robin
from moe_shard.moe.shards import Shards
from moe_shard.moe.weights import ExpertWeights
from moe_shard.sharding.varying import vary_alike

_HEADROOM = 1 / 32
"""Rows of the first round above a balanced load, as a part of it."""
_FURTHER = 1 / 8
"""Rows of a further round, as a part of a balanced load."""


@dataclass(frozen=True)
class Load:
    """Sizes of the routing of one chunk of a device's tokens, all static.

    Attributes:
        tokens: T.
        k: K.
        devices: D, of the expert group.
        experts: L, on one device.
    """

    tokens: int
    k: int
    devices: int
    experts: int

    @property
    def rows(self) -> int:
        """Choices of a device, and under balance the rows that it receives."""
        return self.tokens * self.k


def bounds_of(load: Load, *, padded: bool, factor: float) -> tuple[Bound, Bound | None]:
    """What the first round holds, and what each further one; None where there is no other.

    Without a factor the first round holds a balanced load, 1/32 more, and what chance adds
    (four standard deviations of as many random choices); or all that there can be.

    Args:
        load: sizes.
        padded: pieces have a size too.
        factor: rows over those of a balanced load, beyond which to drop; 0 or less: never.
    """
    most = load.tokens * min(load.k, load.experts)  # of one piece
    balanced = load.rows / load.devices
    if factor > 0:
        piece = min(most, math.ceil(balanced * factor))
        if padded:
            return Bound(piece * load.devices, piece), None
        return Bound(min(most * load.devices, math.ceil(load.rows * factor))), None
    rows = min(most * load.devices, _with_headroom(load.rows))
    piece = min(most, _with_headroom(balanced))
    if rows == most * load.devices and (piece == most or not padded):
        return Bound(rows, piece if padded else None), None
    further = Bound(_part(load.rows), _part(balanced))
    if not padded:
        return Bound(rows), Bound(further.rows)
    return Bound(rows, piece), further


def _with_headroom(balanced: float) -> int:
    return math.ceil(balanced * (1 + _HEADROOM) + 4 * math.sqrt(balanced))


def _part(balanced: float) -> int:
    return max(8, math.ceil(balanced * _FURTHER))


class Ragged:
    """The strategy `ragged`; see the module.

    Args:
        config: of the layer.
        placement: of its arrays.
        check_vma: have JAX check that what is said to be equal on devices is.
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
        """See `Strategy`."""
        weights = experts.weights()
        shards = self.placement.shards(x, weights)
        layer = self._on_device(x.shape, shards, experts)
        self.placement.record(self._record(layer))
        mapped = shards.map(layer.apply, check_vma=self.check_vma)
        y, dropped = mapped(x, routing.indices, routing.weights, weights)
        return y, dropped

    def _record(self, layer: _OnDevice) -> MoERecord:
        product = (layer.product.name, layer.product.reason)
        name = "padded all-to-all" if layer.padded else "ragged-all-to-all"
        transport, equal = (name, layer.why_transport), "counts differ"
        if layer.equal_pieces:
            transport = ("equal all-to-all", "forced balance sends every peer as much")
            product, equal = ("batched", "forced balance gives every expert as much"), ""
        if layer.load.devices == 1:
            transport, equal = ("none", self.placement.why_stay), "nothing travels"
        return MoERecord.of(
            self.config,
            transport=transport,
            grouped_product=product,
            singleton=self.placement.why_travel,
            equal_pieces=equal,
        )

    def _on_device(self, shape: tuple[int, ...], shards: Shards, experts: Experts) -> _OnDevice:
        config, platform = self.config, self.placement.sharding.platform
        rows, length = shape[0] // shards.size(shards.batch_axes), shape[1]
        parts = shards.size(shards.length_axes)
        chunks, k = config.num_moe_token_chunks, config.num_experts_per_tok
        tokens = rows * length // parts
        if tokens % chunks:
            raise UserError(
                f"num_moe_token_chunks={chunks} does not divide the {tokens} tokens of a device\n"
                f"fix: a divisor of {tokens}, or another per_device_batch_size"
            )
        devices = shards.expert_parallelism
        load = Load(tokens // chunks, k, devices, config.num_experts // devices)
        dealt = None
        # Of a row that is split over devices, each part begins its turn with another expert.
        if config.router.force_load_balance and (
            parts == 1 or length // parts * k % config.num_experts == 0
        ):
            row = round_robin(tokens=length // parts, k=k, num_experts=config.num_experts)
            dealt = np.tile(row, (rows, 1)).reshape(chunks, load.tokens, k)
        product = choose(
            config.grouped_product,
            platform=platform,
            groups=load.experts,
            rows=load.rows,
            dtype=experts.dtype,
        )
        return _OnDevice(config, shards, platform, experts.gating, load, dealt, product)


@dataclass(frozen=True)
class _OnDevice:
    """The layer on the tokens of one device, inside shard_map.

    Attributes:
        config: of the layer.
        shards: of its arrays.
        platform: of the devices.
        gating: what stands between the experts' products.
        load: of a chunk.
        dealt: [C T K] the experts of the chunks' choices where forced balance makes them known
            now and alike on every device; else None.
        product: how rows meet their experts' weights.
    """

    config: MoEConfig
    shards: Shards
    platform: str
    gating: GatingConfig
    load: Load
    dealt: Int[np.ndarray, "C T K"] | None
    product: GroupedProduct

    def apply(
        self,
        x: Float[Array, "b s m"],
        indices: Int[Array, "b s K"],
        weights: Float[Array, "b s K"],
        stored: ExpertWeights,
    ) -> tuple[Float[Array, "b s m"], Int[Array, "b"]]:
        """Tokens to the weighted sum of their experts, and the choices dropped of each row."""
        with jax.named_scope("experts"):
            in_use = self.shards.weights_in_use(stored)
        tokens, chosen, shares = (
            tuple(jnp.split(each.reshape(-1, each.shape[-1]), self.config.num_moe_token_chunks))
            for each in (x, indices, weights)
        )
        lost: Bool[Array, "N K"] | None = None
        if self.equal_pieces:
            y = self._in_equal_pieces(tokens, shares, in_use)
        elif self.load.devices == 1:
            y = self._in_place(tokens, chosen, shares, in_use)
        else:
            y, lost = self._in_rounds(tokens, chosen, shares, in_use)
        dropped = jnp.zeros(x.shape[:1], jnp.int32)
        if lost is not None:
            dropped = jnp.sum(lost.reshape(indices.shape), axis=(1, 2), dtype=jnp.int32)
            if self.shards.length_axes:
                dropped = jax.lax.psum(dropped, self.shards.length_axes)
        return jnp.concatenate(y).reshape(x.shape), dropped

    @property
    def equal_pieces(self) -> bool:
        """Whether choices are dealt out in turn and come out even, in every chunk."""
        if self.dealt is None:
            return False
        in_turn = round_robin(
            tokens=self.load.tokens, k=self.load.k, num_experts=self.config.num_experts
        )
        return self.load.rows % self.config.num_experts == 0 and bool(np.all(self.dealt == in_turn))

    def _in_equal_pieces(
        self, tokens: Chunks, shares: Chunks, weights: ExpertWeights
    ) -> list[Float[Array, "T m"]]:
        route = EqualPieces(
            self.shards.expert_axes,
            self.load.devices,
            self.load.experts,
            partial(self._experts, batched_product),
            self.config.router.routed_score_on_input,
        )
        each = zip(tokens, shares, strict=True)
        return [route.apply(chunk, share, weights) for chunk, share in each]

    def _in_place(
        self, tokens: Chunks, chosen: ChunkChoices, shares: Chunks, weights: ExpertWeights
    ) -> list[Float[Array, "T m"]]:
        """Without an expert group: every expert is here."""
        alignment = self.product.alignment
        y = []
        for i, chunk in enumerate(tokens):
            with jax.named_scope("dispatch"):
                slots, sizes = at_aligned_groups(
                    self._seat(i, chosen[i]),
                    chosen[i],
                    alignment=alignment,
                    rows=self._held(self.load.rows),
                )
                sent, seats, share = self._sent(chunk, slots, shares[i])
                rows = tokens_to_slots(sent[None], seats)[0]
            with jax.named_scope("experts"):
                rows = self._grouped(weights, rows, sizes)
            with jax.named_scope("combine"):
                y.append(combined(rows, share, slots))
        return y

    def _in_rounds(
        self, tokens: Chunks, chosen: ChunkChoices, shares: Chunks, weights: ExpertWeights
    ) -> tuple[list[Float[Array, "T m"]], Bool[Array, "N K"] | None]:
        """With an expert group: rows to their experts' devices and back."""
        with jax.named_scope("dispatch"):
            seats = [self._seat(i, each) for i, each in enumerate(chosen)]
            counts = self._exchange_counts(seats)
            sent, slots, shares = zip(
                *(
                    self._sent(chunk, seat.slots, share)
                    for chunk, seat, share in zip(tokens, seats, shares, strict=True)
                ),
                strict=True,
            )
        rounds = self.rounds()
        answers = [seating.slots for seating in seats]
        routes = tuple(Routes(*each) for each in zip(slots, answers, counts, strict=True))
        y = list(rounds.carry(sent, weights, routes, shares))
        if not rounds.drops:
            return y, None
        with jax.named_scope("router"):
            me = jax.lax.axis_index(self.shards.expert_axes)
            lost = [
                seating.rank >= kept(count, rounds.first.bound)[me].reshape(-1)[choice]
                for count, seating, choice in zip(counts, seats, chosen, strict=True)
            ]
        return y, jnp.concatenate(lost)

    def _sent(
        self, tokens: Float[Array, "T m"], slots: Slots, shares: Float[Array, "T K"]
    ) -> tuple[Float[Array, "N m"], Slots, Float[Array, "T K"]]:
        """The rows that travel, their slots, and the weights that are left for the sum."""
        if not self.config.router.routed_score_on_input:
            return tokens, slots, shares
        tokens, shares = vary_alike(tokens, shares)
        sent, seats, left = on_input(tokens[None], slots, shares[None])
        return sent[0], seats, left[0]

    def _seat(self, chunk: int, chosen: Int[Array, "T K"]) -> Seating:
        if self.dealt is not None:
            return seat_known(self.dealt[chunk], self.config.num_experts)
        return seat(chosen, self.config.num_experts)

    def _exchange_counts(self, seats: list[Seating]) -> tuple[Counts, ...]:
        """What every device of the group sends to every expert, of each chunk: one exchange."""
        mine = jnp.stack([seating.counts for seating in seats])
        if self.dealt is not None:  # alike on every device
            every = jnp.broadcast_to(mine, (self.load.devices, *mine.shape))
        else:
            every = jax.lax.all_gather(mine, self.shards.expert_axes)
            every = checkpoint_name(every, ROUTING)
        table = (self.load.devices, len(seats), self.load.devices, self.load.experts)
        by_chunk = every.reshape(table).swapaxes(0, 1)
        return tuple(by_chunk[chunk] for chunk in range(len(seats)))

    @property
    def padded(self) -> bool:
        """Whether rows travel in padded pieces, rather than by XLA's ragged-all-to-all."""
        asked = self.config.ragged_transport
        return asked == "padded" or (asked == "auto" and self.platform == "cpu")

    @property
    def why_transport(self) -> str:
        """Why that one."""
        if self.config.ragged_transport != "auto":
            return f"ragged_transport={self.config.ragged_transport}"
        if self.platform == "cpu":
            return "CPU has no ragged-all-to-all"
        return "only rows that were routed are sent"

    def rounds(self) -> Rounds:
        """The way of a chunk's rows, and what each part of it holds."""
        padded, factor = self.padded, self.config.ragged_buffer_factor
        first, further = bounds_of(self.load, padded=padded, factor=factor)
        if self.dealt is not None:
            piece = longest_piece(self.dealt, self.load)
            first, further = Bound(piece * self.load.devices, piece if padded else None), None
        return Rounds(
            first=self._transport_of(first),
            further=None if further is None else self._transport_of(further),
            alignment=self.product.alignment,
            compute=self._grouped,
            drops=factor > 0 and self.dealt is None,
        )

    def _transport_of(self, bound: Bound) -> Transport:
        kind = PaddedTransport if self.padded else RaggedTransport
        return kind(self.shards.expert_axes, self.load.rows, bound, self._held(bound.rows))

    def _held(self, rows: int) -> int:
        """Rows of the experts' buffer for so many rows."""
        product = self.product
        return aligned_rows(rows, self.load.experts, product.alignment, product.multiple)

    def _grouped(
        self, weights: ExpertWeights, rows: Float[Array, "R m"], sizes: Int[Array, "L"]
    ) -> Float[Array, "R m"]:
        def product(
            x: Float[Array, "R A"],
            w: Float[Array, "L A *P"],
            bias: Float[Array, "L *P"] | None = None,
        ) -> Float[Array, "R *P"]:
            flat = w.reshape(*w.shape[:2], -1)
            y = grouped_product(x, flat, sizes, using=self.product, platform=self.platform)
            y = y.reshape(-1, *w.shape[2:])
            return y if bias is None else y + of_groups(bias, sizes, rows=y.shape[0])

        return self._experts(product, weights, rows)

    def _experts(
        self, product: Product, weights: ExpertWeights, rows: Float[Array, "*R m"]
    ) -> Float[Array, "*R m"]:
        rows = self.shards.whole_rows(rows)
        y = gated_mlp(rows, weights, product=product, gating=self.gating)
        return self.shards.summed_rows(y)


def longest_piece(dealt: Int[np.ndarray, "C T K"], load: Load) -> int:
    """The most rows that one device sends to one other in any chunk, where all deal alike."""
    owners = dealt.reshape(dealt.shape[0], -1) // load.experts
    return max(int(np.bincount(chunk).max()) for chunk in owners)
