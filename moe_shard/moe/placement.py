"""Place the arrays of an MoE layer: the one file in moe/ that annotates and reads the flag.

The exchange is a change of layout of one array. By sequence: every device has all experts' slots
of its own sequences. By expert: every device has its own experts' slots of all sequences of its
group. The partitioner turns the step from one to the other into an all-to-all over the expert axis,
provided that the batch dim gives up that axis, as it does under `moe_dispatch_no_expert_sharding`
(rule `activation_batch_no_exp` instead of `activation_batch_moe`). If the batch dim keeps it,
the expert dim stays unsharded and the weights of all experts are gathered instead.

Both layouts are always constrained, in both directions. A direct step from the down projection's
partial sums over `tensor` to the layout by sequence is miscompiled by XLA (jax 0.8.3 to 0.10.2,
both partitioners) on some meshes with fsdp, tensor and expert axes: half of the sequences come out
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from moe_shard.moe.axes import (
    EXPERT_A_IN,
    EXPERT_A_OUT,
    EXPERT_B_IN,
    EXPERT_B_OUT,
    EXPERT_BIAS_FUSED,
    EXPERT_BIAS_IN,
    EXPERT_BIAS_OUT,
    EXPERT_WEIGHT_FUSED,
    EXPERT_WEIGHT_IN,
    EXPERT_WEIGHT_OUT,
    TOKENS,
)
from moe_shard.moe.shards import Shards, WeightSpecs
from moe_shard.moe.weights import ExpertWeights
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.rules import LogicalAxes

EXCHANGED = "exchanged"
"""Name of the arrays that an exchange produces, for the remat policy `save_exchanged`."""


class Placement:
    """Place the arrays of one MoE layer.

    Args:
        sharding: the mesh and its rules.
        no_expert_sharding: the flag `moe_dispatch_no_expert_sharding`.
    """

    def __init__(self, sharding: Sharding, *, no_expert_sharding: bool) -> None:
        self.sharding = sharding
        self.expert_axes = sharding.table.expert_axes
        # The flag is read here and nowhere else.
        self.batch = "activation_batch_no_exp" if no_expert_sharding else "activation_batch_moe"
        # Weights are used where the activations' experts are, so the axes that FSDP adds to the
        # experts dim are gathered; all at once where that dim is unsharded in the activations.
        batch_axes = set(sharding.table.sharding_axes(self.batch))
        self.moves_tokens = bool(self.expert_axes) and batch_axes.isdisjoint(self.expert_axes)
        self._exp_in_use = "activation_exp" if batch_axes.isdisjoint(self.expert_axes) else None
        self._consequence = (
            f"expert weights will be all-gathered over {', '.join(self.expert_axes)}"
        )
        if not no_expert_sharding:
            self._consequence += "; moe_dispatch_no_expert_sharding=true moves tokens instead"

    @property
    def why_exchange(self) -> str:
        """Return why tokens have to leave their devices; empty if every device has all experts."""
        sizes = self.sharding.table.axis_sizes
        return " x ".join(f"{axis} axis of {sizes[axis]}" for axis in self.expert_axes)

    @property
    def why_no_exchange(self) -> str:
        """Return why no token leaves its device: expert axes of size 1, or none at all."""
        named = self.sharding.table.named_expert_axes
        return f"the {', '.join(named)} axis has size 1" if named else "no axis is for experts"

    @property
    def expert_parallelism(self) -> int:
        """Return D, devices of an expert group."""
        return math.prod(self.sharding.table.axis_sizes[axis] for axis in self.expert_axes)

    def token_parts(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return how many parts the batch and the length of tokens [B S M] are split into."""
        resolution = self.sharding.table.resolve("moe tokens", TOKENS, shape)
        sizes = self.sharding.table.axis_sizes
        batch, length, _ = (
            math.prod(sizes[axis] for axis in decision.mesh_axes)
            for decision in resolution.decisions
        )
        return batch, length

    def tokens(self, x: Float[Array, "B S M"]) -> Float[Array, "B S M"]:
        """Place the layer's input or output."""
        return self.sharding(x, *TOKENS, name="moe tokens")

    def of_tokens(self, shape: Sequence[int]) -> NamedSharding:
        """Return the sharding of the layer's input and output, [B S M]."""
        return self.sharding.named_sharding("moe tokens", TOKENS, shape)

    def of_batch(self, batch: int) -> NamedSharding:
        """Return the sharding of an array that has a number, or a vector, for each sequence."""
        return self.sharding.named_sharding("moe statistics", TOKENS[:1], (batch,))

    def by_sequence(self, x: Float[Array, "E B C M"]) -> Float[Array, "E B C M"]:
        """Place slots with their tokens: all experts' slots of a device's own sequences."""
        return self.sharding(
            x,
            None,
            "activation_batch_moe",
            None,
            "activation_embed_moe",
            name="moe slots by sequence",
        )

    def to_experts(self, x: Float[Array, "E B C M"]) -> Float[Array, "E B C M"]:
        """Change the layout from by sequence to by expert: the exchange after dispatch."""
        return checkpoint_name(self._by_expert(self.by_sequence(x), "moe expert input"), EXCHANGED)

    def to_sequences(self, y: Float[Array, "E B C M"]) -> Float[Array, "E B C M"]:
        """Change the layout from by expert to by sequence: the exchange before combine."""
        return checkpoint_name(self.by_sequence(self._by_expert(y, "moe expert output")), EXCHANGED)

    def hidden(self, h: Float[Array, "E B C H"]) -> Float[Array, "E B C H"]:
        """Place the activations between an expert's two products."""
        return self.sharding(
            h,
            "activation_exp",
            self.batch,
            None,
            "activation_mlp_moe",
            name="moe hidden",
            consequence=self._consequence,
        )

    def weights_in_use(self, weights: ExpertWeights) -> ExpertWeights:
        """Bring the weights from where they are stored to where they are multiplied with slots."""
        use = self.sharding.use_weight
        exp, hidden = self._exp_in_use, "activation_mlp_moe"
        stored: LogicalAxes = EXPERT_WEIGHT_IN
        used: LogicalAxes = (exp, None, hidden)
        if weights.fused:
            stored, used = EXPERT_WEIGHT_FUSED, (exp, None, None, hidden)
        inward = tuple(use(w, stored, used, name="moe gate, up") for w in weights.inward)
        down = use(weights.down, EXPERT_WEIGHT_OUT, (exp, hidden, None), name="moe down")
        inside, outside = (exp, None, hidden), (exp, hidden, None)
        whole = (exp, None, None)
        lora = (
            self._adapters(
                weights.inward_lora, (EXPERT_A_IN, EXPERT_B_IN), (whole, inside), "gate, up"
            ),
            self._adapters(
                weights.down_lora, (EXPERT_A_OUT, EXPERT_B_OUT), (outside, whole), "down"
            ),
        )
        if weights.down_bias is None:
            return ExpertWeights(inward, down, (), None, *lora)
        stored, used = EXPERT_BIAS_IN, (exp, hidden)
        if weights.fused:
            stored, used = EXPERT_BIAS_FUSED, (exp, None, hidden)
        biases = tuple(use(b, stored, used, name="moe gate, up bias") for b in weights.inward_bias)
        bias = use(weights.down_bias, EXPERT_BIAS_OUT, (exp, None), name="moe down bias")
        return ExpertWeights(inward, down, biases, bias, *lora)

    def _adapters(
        self,
        arrays: tuple[Array, ...],
        stored: tuple[LogicalAxes, LogicalAxes],
        used: tuple[LogicalAxes, LogicalAxes],
        name: str,
    ) -> tuple[Array, ...]:
        """Bring A and the Bs to where they are multiplied; see `weights_in_use`."""
        return tuple(
            self.sharding.use_weight(
                each, stored[n > 0], used[n > 0], name=f"moe {name} adapter {'AB'[n > 0]}"
            )
            for n, each in enumerate(arrays)
        )

    def shards(self, x: Float[Array, "B S M"], weights: ExpertWeights, *, strategy: str) -> Shards:
        """Return how the layer's arrays are split, for code that runs per device.

        Args:
            x: the layer's input; only its shape and dtype are read.
            weights: the weights as stored; only their shapes and dtypes are read.
            strategy: the calling strategy's name, for messages.

        Raises:
            UserError: see `Shards`.
        """

        def spec(name: str, axes: LogicalAxes, of: Array) -> PartitionSpec:
            return self.sharding.named_sharding(name, axes, of.shape, dtype=of.dtype).spec

        fused = weights.fused
        axes: LogicalAxes = EXPERT_WEIGHT_FUSED if fused else EXPERT_WEIGHT_IN
        of_bias: LogicalAxes = EXPERT_BIAS_FUSED if fused else EXPERT_BIAS_IN
        bias = weights.down_bias
        return Shards(
            self.sharding.mesh,
            tokens=spec("moe tokens", TOKENS, x),
            weights=WeightSpecs(
                tuple(spec("moe gate, up as stored", axes, w) for w in weights.inward),
                spec("moe down as stored", EXPERT_WEIGHT_OUT, weights.down),
                tuple(spec("moe gate, up bias as stored", of_bias, b) for b in weights.inward_bias),
                None if bias is None else spec("moe down bias as stored", EXPERT_BIAS_OUT, bias),
                tuple(
                    spec("moe gate, up adapter as stored", EXPERT_B_IN if n else EXPERT_A_IN, each)
                    for n, each in enumerate(weights.inward_lora)
                ),
                tuple(
                    spec("moe down adapter as stored", EXPERT_B_OUT if n else EXPERT_A_OUT, each)
                    for n, each in enumerate(weights.down_lora)
                ),
            ),
            expert_axes=self.expert_axes,
            strategy=f"moe_dispatch={strategy}",
        )

    def _by_expert(self, x: Float[Array, "E B C M"], name: str) -> Float[Array, "E B C M"]:
        return self.sharding(
            x,
            "activation_exp",
            self.batch,
            None,
            "activation_embed_moe",
            name=name,
            consequence=self._consequence,
        )
