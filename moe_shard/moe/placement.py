"""Where the arrays of an MoE layer live: the one file in moe/ that names logical axes.

The exchange is a change of layout of one array. By row: every device has all experts' slots of its
own batch rows. By expert: every device has its own experts' slots of all rows of its group. The
partitioner turns the step from one to the other into an all-to-all over the expert axis, provided
that the batch dim gives that axis up, which is what `moe_dispatch_no_expert_sharding` selects
(`activation_batch_no_exp` instead of `activation_batch_moe`). If the batch dim keeps it, the
expert dim stays unsharded and the weights of all experts are gathered instead.

Both layouts are always pinned, in both directions. One direct hop from the down projection's
partial sums over `tensor` to the layout by row is miscompiled by XLA (jax 0.8.3 to 0.10.2, both
partitioners) on some meshes with fsdp, tensor and expert axes: half of the rows come out wrong.
"""

from __future__ import annotations

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moe_shard.sharding.annotate import Annotator

EXCHANGED = "exchanged"
"""Name of the arrays that have just crossed the wire, for the remat policy `save_exchanged`."""

EXPERT_WEIGHT_IN = ("exp", "embed_moe", "mlp_moe")
EXPERT_WEIGHT_OUT = ("exp", "mlp_moe", "embed_moe")
ROUTER_KERNEL = ("embed_router", "exp_router")


class Placement:
    """Pins the arrays of one MoE layer.

    Args:
        annotate: the mesh and its rules.
        no_expert_sharding: the flag `moe_dispatch_no_expert_sharding`.
    """

    def __init__(self, annotate: Annotator, *, no_expert_sharding: bool) -> None:
        self.annotate = annotate
        self.expert_axes = annotate.table.sharding_axes("exp")
        # Read here and nowhere else.
        self.batch = "activation_batch_no_exp" if no_expert_sharding else "activation_batch_moe"
        # Weights of experts that stay whole in the activations are gathered once, not twice.
        taken = set(annotate.table.sharding_axes(self.batch))
        self._exp_in_use = "exp" if taken.isdisjoint(self.expert_axes) else None
        self._consequence = (
            f"expert weights will be all-gathered over {', '.join(self.expert_axes)}"
        )
        if not no_expert_sharding:
            self._consequence += "; moe_dispatch_no_expert_sharding=true moves tokens instead"

    def tokens(self, x: Float[Array, "B S M"]) -> Float[Array, "B S M"]:
        """The layer's input and output."""
        return self.annotate(
            x,
            "activation_batch_moe",
            "activation_length_moe",
            "activation_embed_moe",
            name="moe tokens",
        )

    def to_experts(self, x: Float[Array, "E B C M"]) -> Float[Array, "E B C M"]:
        """By row to by expert: the exchange after dispatch."""
        return checkpoint_name(self._by_expert(self._by_row(x), "moe expert input"), EXCHANGED)

    def to_rows(self, y: Float[Array, "E B C M"]) -> Float[Array, "E B C M"]:
        """By expert to by row: the exchange before combine."""
        return checkpoint_name(self._by_row(self._by_expert(y, "moe expert output")), EXCHANGED)

    def hidden(self, h: Float[Array, "E B C H"]) -> Float[Array, "E B C H"]:
        """Activations between an expert's two products."""
        return self.annotate(
            h,
            "activation_exp",
            self.batch,
            None,
            "activation_mlp_moe",
            name="moe hidden",
            consequence=self._consequence,
        )

    def weight_in(self, w: Float[Array, "E M H"]) -> Float[Array, "E M H"]:
        """Gate and up projections, from where they are stored to where they are used."""
        return self.annotate.use_weight(
            w, EXPERT_WEIGHT_IN, (self._exp_in_use, None, "activation_mlp_moe"), name="moe gate, up"
        )

    def weight_out(self, w: Float[Array, "E H M"]) -> Float[Array, "E H M"]:
        """Down projection, likewise."""
        return self.annotate.use_weight(
            w, EXPERT_WEIGHT_OUT, (self._exp_in_use, "activation_mlp_moe", None), name="moe down"
        )

    def _by_row(self, x: Float[Array, "E B C M"]) -> Float[Array, "E B C M"]:
        return self.annotate(
            x, None, "activation_batch_moe", None, "activation_embed_moe", name="moe slots by row"
        )

    def _by_expert(self, x: Float[Array, "E B C M"], name: str) -> Float[Array, "E B C M"]:
        return self.annotate(
            x,
            "activation_exp",
            self.batch,
            None,
            "activation_embed_moe",
            name=name,
            consequence=self._consequence,
        )
