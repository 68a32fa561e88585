"""Decide how `ragged` exchanges, from configuration, mesh and shapes, before tracing.

The layer executes a `RaggedPlan` and the record reports it, so that they cannot disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from moe_shard.config.moe_config import MoEConfig
from moe_shard.errors import UserError
from moe_shard.moe.exchange.segments import RoundLimit, buffer_size
from moe_shard.moe.grouped import GroupedProduct, choose
from moe_shard.moe.placement import Placement
from moe_shard.moe.record import MoERecord
from moe_shard.moe.router import round_robin

_HEADROOM = 1 / 32
"""Copies of the first round beyond a balanced load, as a fraction of it."""
_FURTHER = 1 / 8
"""Copies of a further round, as a fraction of a balanced load."""

ExchangeKind = Literal["local", "equal", "padded", "ragged"]


@dataclass(frozen=True)
class Load:
    """Hold the sizes of the routing of one chunk of a device's tokens, all static.

    Attributes:
        tokens: T, tokens of the chunk.
        k: K, experts per token.
        devices: D, devices of the expert group.
        experts: L, experts on one device.
    """

    tokens: int
    k: int
    devices: int
    experts: int

    @property
    def copies(self) -> int:
        """Return N, choices of a device's tokens; if balanced, also the copies that it receives."""
        return self.tokens * self.k


@dataclass(frozen=True)
class RoundSizes:
    """Hold the static sizes by which one round is exchanged.

    Attributes:
        axes: mesh axes of the expert group.
        copies: N, choices of a device's tokens.
        limit: what the round holds.
        buffer: R, copies that the experts' buffer holds.
        padded: whether it is exchanged in padded pieces of equal size, rather than by XLA's
            ragged-all-to-all.
    """

    axes: tuple[str, ...]
    copies: int
    limit: RoundLimit
    buffer: int
    padded: bool


@dataclass(frozen=True, eq=False)
class RaggedPlan:
    """Describe what `ragged` does for one layer and shape.

    Attributes:
        exchange: "local": nothing is exchanged; "equal": pieces of equal size, for forced balance;
            "padded": padded pieces; "ragged": XLA's ragged-all-to-all.
        why: the reason for that exchange.
        load: sizes of a chunk.
        known: [C T K] experts of the chunks' choices, where forced balance makes them known at
            tracing time and equal on every device; else None.
        product: how token copies are multiplied by their experts' weights.
        first: what the first round holds.
        further: what each further round holds; None where there is none.
        drops: whether choices beyond the first round are dropped, the same fraction for every
            expert.
    """

    exchange: ExchangeKind
    why: str
    load: Load
    known: Int[np.ndarray, "C T K"] | None
    product: GroupedProduct
    first: RoundLimit
    further: RoundLimit | None
    drops: bool

    def buffer(self, copies: int) -> int:
        """Return R, the size of the experts' buffer for this many copies."""
        return buffer_size(copies, self.load.experts, self.product.alignment, self.product.multiple)

    def round_sizes(self, axes: tuple[str, ...], limit: RoundLimit) -> RoundSizes:
        """Return how a round of this limit is exchanged over the axes of the expert group."""
        padded = self.exchange == "padded"
        return RoundSizes(axes, self.load.copies, limit, self.buffer(limit.copies), padded)

    def record(self, config: MoEConfig, placement: Placement) -> MoERecord:
        """Return the plan as a record."""
        product = (self.product.name, self.product.reason)
        gate_up: str | None = self.product.why_not_gated
        equal = "counts differ"
        name = "padded all-to-all" if self.exchange == "padded" else "ragged-all-to-all"
        if self.exchange == "equal":
            name, equal = "equal all-to-all", ""
            product, gate_up = ("batched", "forced balance gives every expert as much"), None
        transport = (name, self.why)
        if self.load.devices == 1:
            transport, equal = ("none", placement.why_no_exchange), "nothing is exchanged"
        return MoERecord.of(
            config,
            transport=transport,
            grouped_product=product,
            singleton=placement.why_exchange,
            equal_pieces=equal,
            gate_up=gate_up,
        )


def plan_ragged(
    config: MoEConfig, placement: Placement, tokens: tuple[int, ...], dtype: DTypeLike
) -> RaggedPlan:
    """Decide how a layer of this configuration exchanges tokens of this shape.

    Args:
        config: the layer's configuration.
        placement: the placement of the layer's arrays.
        tokens: [B S M], the shape of the layer's input on all devices together.
        dtype: dtype of the experts' products.

    Raises:
        UserError: chunks that do not divide the tokens of a device, or a transport or product that
            does not run on these devices.
    """
    platform = placement.sharding.platform
    batch_parts, length_parts = placement.token_parts(tokens)
    sequences, length = tokens[0] // batch_parts, tokens[1] // length_parts
    chunks, k = config.num_moe_token_chunks, config.num_experts_per_tok
    on_device = sequences * length
    if on_device % chunks:
        raise UserError(
            f"num_moe_token_chunks={chunks} does not divide the {on_device} tokens of a device\n"
            f"fix: a divisor of {on_device}, or another per_device_batch_size"
        )
    devices = placement.expert_parallelism
    load = Load(on_device // chunks, k, devices, config.num_experts // devices)
    known = None
    # If a sequence is split over devices, each part starts at another expert.
    if config.router.force_load_balance and (
        length_parts == 1 or length * k % config.num_experts == 0
    ):
        of_sequence = round_robin(tokens=length, k=k, num_experts=config.num_experts)
        known = np.tile(of_sequence, (sequences, 1)).reshape(chunks, load.tokens, k)
    exchange, why = _exchange(config, platform, load, known)
    padded, factor = exchange == "padded", config.ragged_buffer_factor
    first, further = limits_of(load, padded=padded, factor=factor)
    if known is not None:
        piece = longest_piece(known, load)
        first, further = RoundLimit(piece * devices, piece if padded else None), None
    return RaggedPlan(
        exchange=exchange,
        why=why,
        load=load,
        known=known,
        product=choose(
            config.grouped_product,
            platform=platform,
            groups=load.experts,
            rows=load.copies,
            dtype=dtype,
            dims=(tokens[2], config.moe_mlp_dim),
            device=placement.sharding.device,
        ),
        first=first,
        further=further,
        drops=factor > 0 and known is None,
    )


def _exchange(
    config: MoEConfig, platform: str, load: Load, known: Int[np.ndarray, "C T K"] | None
) -> tuple[ExchangeKind, str]:
    """Choose the exchange, and give the reason."""
    if known is not None and _is_even(known, load, config.num_experts):
        return "equal", "forced balance sends every peer as much"
    if load.devices == 1:
        return "local", "every device has all experts"
    asked = config.ragged_transport
    if asked == "auto":
        if platform == "cpu":
            return "padded", "CPU has no ragged-all-to-all"
        return "ragged", "only token copies that were routed are sent"
    return asked, f"ragged_transport={asked}"


def _is_even(known: Int[np.ndarray, "C T K"], load: Load, num_experts: int) -> bool:
    """Return whether every chunk's choices are round-robin, the same number for each expert."""
    even = round_robin(tokens=load.tokens, k=load.k, num_experts=num_experts)
    return load.copies % num_experts == 0 and bool(np.all(known == even))


def limits_of(load: Load, *, padded: bool, factor: float) -> tuple[RoundLimit, RoundLimit | None]:
    """Return what the first round holds, and what each further one does; None if there is none.

    Without a factor the first round holds a balanced load plus 1/32 of it plus four standard
    deviations of as many random choices, but never more than there can be.

    Args:
        load: the sizes of a chunk.
        padded: whether pieces have a size of their own.
        factor: copies over those of a balanced load, beyond which to drop; 0 or less: never.
    """
    most = load.tokens * min(load.k, load.experts)  # of one piece
    balanced = load.copies / load.devices
    if factor > 0:
        piece = min(most, math.ceil(balanced * factor))
        if padded:
            return RoundLimit(piece * load.devices, piece), None
        return RoundLimit(min(most * load.devices, math.ceil(load.copies * factor))), None
    copies = min(most * load.devices, _with_headroom(load.copies))
    piece = min(most, _with_headroom(balanced))
    if copies == most * load.devices and (piece == most or not padded):
        return RoundLimit(copies, piece if padded else None), None
    further = RoundLimit(_part(load.copies), _part(balanced))
    if not padded:
        return RoundLimit(copies), RoundLimit(further.copies)
    return RoundLimit(copies, piece), further


def longest_piece(known: Int[np.ndarray, "C T K"], load: Load) -> int:
    """Return the most copies that one device sends to another, if all have the same choices."""
    owners = known.reshape(known.shape[0], -1) // load.experts
    return max(int(np.bincount(chunk).max()) for chunk in owners)


def _with_headroom(balanced: float) -> int:
    return math.ceil(balanced * (1 + _HEADROOM) + 4 * math.sqrt(balanced))


def _part(balanced: float) -> int:
    return max(8, math.ceil(balanced * _FURTHER))
