"""Decide how `ragged` exchanges: from configuration, mesh and shapes, before anything is traced.

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
"""Copies of the first round above a balanced load, as a part of it."""
_FURTHER = 1 / 8
"""Copies of a further round, as a part of a balanced load."""

ExchangeKind = Literal["local", "equal", "padded", "ragged"]


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
    def copies(self) -> int:
        """N, choices of a device's tokens; under balance, also the copies that it receives."""
        return self.tokens * self.k


@dataclass(frozen=True)
class RoundSizes:
    """How one round is exchanged; sizes that are static.

    Attributes:
        axes: mesh axes of the expert group.
        copies: N, of a device's choices.
        limit: what the round holds.
        buffer: R, copies that the experts' buffer holds.
        padded: in padded pieces of equal size, rather than by XLA's ragged-all-to-all.
    """

    axes: tuple[str, ...]
    copies: int
    limit: RoundLimit
    buffer: int
    padded: bool


@dataclass(frozen=True, eq=False)
class RaggedPlan:
    """What `ragged` does for one layer and shape.

    Attributes:
        exchange: "local" where nothing is exchanged; "equal" pieces, of forced balance; "padded"
            pieces; or XLA's "ragged" all-to-all.
        why: the reason for that exchange.
        load: of a chunk.
        known: [C T K] the experts of the chunks' choices where forced balance makes them known
            before tracing and alike on every device; else None.
        product: how token copies are multiplied with their experts' weights.
        first: what the first round holds.
        further: what each further one holds; None where there is none.
        drops: what is beyond the first round is dropped, the same fraction of every expert's.
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
        """Return R of the experts' buffer for so many copies."""
        return buffer_size(copies, self.load.experts, self.product.alignment, self.product.multiple)

    def round_sizes(self, axes: tuple[str, ...], limit: RoundLimit) -> RoundSizes:
        """Return how a round of this limit is exchanged over the axes of the expert group."""
        padded = self.exchange == "padded"
        return RoundSizes(axes, self.load.copies, limit, self.buffer(limit.copies), padded)

    def record(self, config: MoEConfig, placement: Placement) -> MoERecord:
        """Return the plan as a record."""
        product = (self.product.name, self.product.reason)
        equal = "counts differ"
        name = "padded all-to-all" if self.exchange == "padded" else "ragged-all-to-all"
        if self.exchange == "equal":
            name, equal = "equal all-to-all", ""
            product = ("batched", "forced balance gives every expert as much")
        transport = (name, self.why)
        if self.load.devices == 1:
            transport, equal = ("none", placement.why_no_exchange), "nothing is exchanged"
        return MoERecord.of(
            config,
            transport=transport,
            grouped_product=product,
            singleton=placement.why_exchange,
            equal_pieces=equal,
        )


def plan_ragged(
    config: MoEConfig, placement: Placement, tokens: tuple[int, ...], dtype: DTypeLike
) -> RaggedPlan:
    """Decide how a layer of this configuration exchanges tokens of this shape.

    Args:
        config: of the layer.
        placement: of its arrays.
        tokens: [B S M], the shape of the layer's input on all devices together.
        dtype: of the experts' products.

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
    # Of a sequence that is split over devices, each part starts at another expert.
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
    """Return whether every chunk's choices are the experts round-robin, equally many times each."""
    even = round_robin(tokens=load.tokens, k=load.k, num_experts=num_experts)
    return load.copies % num_experts == 0 and bool(np.all(known == even))


def limits_of(load: Load, *, padded: bool, factor: float) -> tuple[RoundLimit, RoundLimit | None]:
    """Return what the first round holds, and what each further one; None where there is no other.

    Without a factor the first round holds a balanced load, 1/32 more, and what chance adds
    (four standard deviations of as many random choices); or all that there can be.

    Args:
        load: sizes.
        padded: pieces have a size too.
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
    """Return the most copies that one device sends to another, all having the same choices."""
    owners = known.reshape(known.shape[0], -1) // load.experts
    return max(int(np.bincount(chunk).max()) for chunk in owners)


def _with_headroom(balanced: float) -> int:
    return math.ceil(balanced * (1 + _HEADROOM) + 4 * math.sqrt(balanced))


def _part(balanced: float) -> int:
    return max(8, math.ceil(balanced * _FURTHER))
