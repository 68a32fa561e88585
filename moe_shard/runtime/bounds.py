"""Compute the least work of the MoE layers in a training step, whatever program does it.

The bounds are counted from the configuration and the rule table, for one device and one step
(forward, backward, all layers, all microbatches). There are two counts: for the configured
capacity, empty slots included, since a capacity strategy exchanges and multiplies them; and
dropless, for the tokens alone, routed evenly over the experts, with one copy for each choice.
Shared experts, which are a dense MLP, the experts' biases and what adapters add are in neither;
gradients that no parameter that is trained needs are not in them either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from moe_shard.config.model_config import ModelConfig
from moe_shard.config.schema import Config
from moe_shard.lowering.collectives import Collective, Extraction
from moe_shard.lowering.op_names import MOE_SCOPES
from moe_shard.lowering.work import flops_by_scope, memory_by_scope
from moe_shard.models.flops import trained_products
from moe_shard.program.step import Program
from moe_shard.program.trainable import is_adapter
from moe_shard.sharding.rules import BoundTable
from moe_shard.units import human_bytes, human_flops

LAYER_EXCHANGES = 4
"""Exchanges of a layer: to the experts and back, in the forward and in the backward pass."""
PRODUCTS = 3 * 3
"""Products of an expert with a gate: gate, up and down, each once forward and twice backward."""


class Shares(NamedTuple):
    """Hold for which share of the experts' weights a step computes gradients.

    Attributes:
        of_input: of what they are multiplied with.
        of_param: of themselves.
    """

    of_input: float = 1.0
    of_param: float = 1.0

    @property
    def passes(self) -> float:
        """Return how often a product is done: once forward, and for each gradient."""
        return 1 + self.of_input + self.of_param


ALL = Shares()
"""Where all parameters are trained."""


def gradient_shares(config: ModelConfig, program: Program) -> Shares:
    """Return for which share of a model's experts the step of a program computes gradients."""
    found = [
        each
        for each in trained_products(config, program.model.specs, program.trained)
        if "exp" in each.spec.logical_axes and not is_adapter(each.spec.name)
    ]
    total = sum(each.params for each in found)
    return Shares(
        sum(each.params * each.of_input for each in found) / total,
        sum(each.params * each.of_param for each in found) / total,
    )


@dataclass(frozen=True)
class MoEBounds:
    """Hold the least work of one device in one step, for all MoE layers together.

    Attributes:
        wire_bytes: bytes to send along the expert axes at the configured capacity.
        dropless_wire_bytes: bytes to send along the expert axes for the tokens alone.
        flops: FLOPs of the experts' products at the configured capacity.
        dropless_flops: FLOPs of the experts' products for the tokens alone.
        weight_bytes: bytes to read the device's experts forward and backward, and to write their
            gradients.
        memory_bytes: `weight_bytes`, and the bytes to read and write for the configured slots:
            their vectors before and after both layers of the experts' MLP, once forward, twice
            backward where inputs and weights have gradients.
    """

    wire_bytes: int
    dropless_wire_bytes: int
    flops: int
    dropless_flops: int
    weight_bytes: int
    memory_bytes: int

    def lines(self, extraction: Extraction, expert_axes: Iterable[str]) -> list[str]:
        """Write the bounds for people, each next to the work of a program.

        Args:
            extraction: the program.
            expert_axes: the mesh axes of the experts.
        """
        sent = moe_wire_bytes(extraction.collectives, expert_axes)
        done = flops_by_scope(extraction.walk, extraction.roles.flow)["experts"]
        moved = memory_by_scope(extraction.walk)["experts"]
        # TPU multiplies float32 as bfloat16, and then exchanges only bfloat16.
        narrower = "; in a narrower dtype than the model's" if sent < self.wire_bytes else ""
        return [
            f"MoE exchange per device: {human_bytes(sent)} on the wire"
            f"{_times(sent, self.wire_bytes)} ({human_bytes(self.wire_bytes)}; "
            f"dropless {human_bytes(self.dropless_wire_bytes)}{narrower})",
            f"MoE products per device: {_known(done, human_flops)}{_times(done, self.flops)} "
            f"({human_flops(self.flops)}; dropless {human_flops(self.dropless_flops)})",
            f"MoE memory per device: {_known(moved, human_bytes)} read and written by the experts"
            f"{_times(moved, self.memory_bytes)} ({human_bytes(self.memory_bytes)}, "
            f"{human_bytes(self.weight_bytes)} of it weights and their gradients)",
        ]


def _known(done: int, shown: Callable[[int], str]) -> str:
    """Write a measure of work; 0 means that it cannot be read from the text."""
    return shown(done) if done else "unknown, the text does not tell the experts' work apart;"


def _times(done: float, least: float) -> str:
    return f", {done / least:.2f} x the least" if least and done else ""


def moe_bounds(
    config: Config,
    table: BoundTable,
    *,
    copies_per_sequence: int,
    gradients: Shares = ALL,
) -> MoEBounds | None:
    """Compute the bounds of a configuration on a mesh; None for a dense model.

    Args:
        config: model and batch.
        table: the rules on the mesh.
        copies_per_sequence: token copies, or slots, of all experts together for one sequence, see
            `moe.capacity.copies_per_sequence`.
        gradients: those that the step computes.
    """
    moe = config.model.moe
    if moe is None:
        return None
    sizes = table.axis_sizes
    rows = config.train.global_batch_rows(math.prod(sizes.values()))

    def shards(logical_axis: str) -> int:
        return math.prod(sizes[axis] for axis in table.sharding_axes(logical_axis))

    experts = math.prod(sizes[axis] for axis in table.expert_axes)
    expert_dim = moe.expert_dim(config.model.emb_dim)
    token_bytes = expert_dim * jnp.dtype(config.model.dtype).itemsize
    layers = sum(kind.moe for kind in config.model.all_layer_kinds)
    # For the sequences that one device holds, over all layers.
    sequences = layers * rows / shards("activation_batch_moe")
    slots = sequences * copies_per_sequence
    choices = sequences * config.train.max_target_length * moe.num_experts_per_tok
    exchanges = LAYER_EXCHANGES * (1 + gradients.of_input) / 2
    sent = exchanges * token_bytes / shards("activation_embed_moe") * (experts - 1) / experts
    projections = config.model.gating.projections
    elements = projections * expert_dim * moe.moe_mlp_dim
    multiplied = 2 * gradients.passes * elements / shards("activation_mlp_moe")
    weights = moe.num_experts * elements / experts
    weights *= layers / shards("activation_mlp_moe")
    itemsize = jnp.dtype(config.model.dtype).itemsize
    weight_bytes = weights * config.train.gradient_accumulation_steps * gradients.passes * itemsize
    ends = expert_dim / shards("activation_embed_moe")
    hidden = moe.moe_mlp_dim / shards("activation_mlp_moe")
    slot_bytes = gradients.passes * 2 * (ends + hidden) * itemsize
    return MoEBounds(
        wire_bytes=round(slots * sent),
        dropless_wire_bytes=round(choices * sent),
        flops=round(slots * multiplied),
        dropless_flops=round(choices * multiplied),
        weight_bytes=round(weight_bytes),
        memory_bytes=round(weight_bytes + slots * slot_bytes),
    )


def moe_wire_bytes(collectives: Iterable[Collective], expert_axes: Iterable[str]) -> int:
    """Return the bytes that MoE layers send along the expert axes, per device and step."""
    wanted = set(expert_axes)
    return sum(
        each.count * each.wire_bytes
        for each in collectives
        if each.scope in MOE_SCOPES and wanted & set(each.axes)
    )
