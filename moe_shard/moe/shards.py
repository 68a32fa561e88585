"""Split the arrays of an MoE layer for code that runs on each device by itself, in shard_map.

The partitioner is not involved: the gathers of FSDP and the sums of tensor parallelism are written
out, over the mesh axes of the rule table. Dims as in `moe_shard.moe.exchange`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

from moe_shard.errors import UserError
from moe_shard.moe.weights import ExpertWeights
from moe_shard.sharding.annotate import axes_of
from moe_shard.sharding.varying import vary_over

Axes = tuple[str, ...]


class WeightSpecs(NamedTuple):
    """Hold the specs of an `ExpertWeights`, field by field."""

    inward: tuple[PartitionSpec, ...]
    down: PartitionSpec
    inward_bias: tuple[PartitionSpec, ...]
    down_bias: PartitionSpec | None
    inward_lora: tuple[PartitionSpec, ...] = ()
    down_lora: tuple[PartitionSpec, ...] = ()


@dataclass(frozen=True)
class Shards:
    """Describe how one layer's arrays are split, and make what a device needs from its shards.

    Attributes:
        mesh: the mesh of the devices.
        tokens: spec of the layer's input and output, [B S M].
        weights: specs of `ExpertWeights`, as stored.
        expert_axes: the mesh axes that split the experts; their devices are an expert group.
        strategy: `moe_dispatch=` and its value, for messages.

    Raises:
        UserError: the rule table lays tokens or experts out in a way that cannot be exchanged.
    """

    mesh: Mesh | AbstractMesh
    tokens: PartitionSpec
    weights: WeightSpecs
    expert_axes: Axes
    strategy: str

    def __post_init__(self) -> None:
        missing = [axis for axis in self.expert_axes if axis not in self.token_axes]
        if missing:
            raise UserError(
                f"{self.strategy}: tokens are not split over {', '.join(missing)}, but experts "
                "are, so no single device has a token to send\n"
                f"fix: {', '.join(missing)} in the rule of activation_batch_moe, or "
                "moe_dispatch=gather"
            )
        stored = axes_of(self.weights.down[0])
        if stored[: len(self.expert_axes)] != self.expert_axes:
            raise UserError(
                f"{self.strategy}: expert weights are stored over {', '.join(stored) or 'no'} "
                f"axes, but used over {', '.join(self.expert_axes)}, which must come first\n"
                "fix: the rule of exp begins with the axes of activation_exp"
            )

    @property
    def token_axes(self) -> Axes:
        """Return the mesh axes over which tokens are split: first sequences, then positions."""
        return self.batch_axes + self.length_axes

    @property
    def batch_axes(self) -> Axes:
        """Return the mesh axes over which sequences are distributed."""
        return axes_of(self.tokens[0])

    @property
    def length_axes(self) -> Axes:
        """Return the mesh axes over which the tokens of one sequence are split."""
        return axes_of(self.tokens[1])

    @property
    def embed_axes(self) -> Axes:
        """Return the mesh axes over which M is split between the experts' products."""
        return axes_of(self.tokens[2])

    @property
    def hidden_axes(self) -> Axes:
        """Return the mesh axes over which H stays split in use: those that split no tokens."""
        return tuple(axis for axis in axes_of(self.weights.down[1]) if axis not in self.token_axes)

    @property
    def expert_parallelism(self) -> int:
        """Return D, devices of an expert group."""
        return self.size(self.expert_axes)

    def size(self, axes: Axes) -> int:
        """Return the number of devices along these mesh axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def map(
        self, local: Callable[..., Any], *, check_vma: bool
    ) -> Callable[..., tuple[Array, Array]]:
        """Map `local(x, indices, weights, expert_weights) -> (y, dropped)` over the devices.

        Args:
            local: maps [b s M], [b s K], [b s K] and the stored weights to [b s M] and [b].
            check_vma: whether JAX checks that values declared equal on devices are equal.
        """
        sequences = PartitionSpec(self.tokens[0])
        weights: Any = ExpertWeights(*self.weights)  # type: ignore[arg-type]
        choices = PartitionSpec(self.tokens[0], self.tokens[1])
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(self.tokens, choices, choices, weights),
            out_specs=(self.tokens, sequences),
            check_vma=check_vma,
        )

    def weights_in_use(self, stored: ExpertWeights) -> ExpertWeights:
        """Gather what FSDP splits: this device's experts, split over tensor axes only.

        The gradient is scattered along the same axes. Over axes that split tokens but not weights
        (data) it is summed after that, as a shard: hence the cast to varying comes first.
        """

        def inward(
            arrays: tuple[Array, ...], specs: tuple[PartitionSpec, ...]
        ) -> tuple[Array, ...]:
            pairs = zip(arrays, specs, strict=True)
            return tuple(self._gathered(w, spec, hidden=w.ndim - 1) for w, spec in pairs)

        def adapters(
            arrays: tuple[Array, ...],
            specs: tuple[PartitionSpec, ...],
            hidden: tuple[int | None, int | None],
        ) -> tuple[Array, ...]:
            pairs = zip(arrays, specs, strict=True)
            return tuple(
                self._gathered(w, spec, hidden=hidden[n > 0]) for n, (w, spec) in enumerate(pairs)
            )

        specs = self.weights
        bias = stored.down_bias
        if bias is not None:
            assert specs.down_bias is not None
            bias = self._gathered(bias, specs.down_bias, hidden=None)
        return ExpertWeights(
            inward(stored.inward, specs.inward),
            self._gathered(stored.down, specs.down, hidden=1),
            inward(stored.inward_bias, specs.inward_bias),
            None if bias is None else self._once(bias),
            adapters(stored.inward_lora, specs.inward_lora, (None, 2)),
            adapters(stored.down_lora, specs.down_lora, (1, None)),
        )

    def _once(self, bias: Float[Array, "E M"]) -> Float[Array, "E M"]:
        """Keep a bias with one of the parts of H that are summed, and set it to 0 with others."""
        if not self.hidden_axes:
            return bias
        first = jax.lax.axis_index(self.hidden_axes) == 0
        return jnp.where(first, bias, jnp.zeros_like(bias))

    def _gathered(self, w: Array, spec: PartitionSpec, *, hidden: int | None) -> Array:
        w = vary_over(w, self.token_axes)
        for dim, entry in enumerate(spec):
            stays = self.expert_axes if dim == 0 else self.hidden_axes if dim == hidden else ()
            axes = tuple(axis for axis in axes_of(entry) if axis not in stays)
            if axes:
                w = jax.lax.all_gather(w, axes, axis=dim, tiled=True)
        return w

    def whole_embed(self, x: Float[Array, "*R m"]) -> Float[Array, "*R M"]:
        """Gather the model dim, for products that contract it."""
        if not self.embed_axes:
            return x
        return jax.lax.all_gather(x, self.embed_axes, axis=x.ndim - 1, tiled=True)

    def summed_hidden(self, y: Float[Array, "*R M"]) -> Float[Array, "*R m"]:
        """Sum over the parts of H, and split the model dim."""
        last = y.ndim - 1
        if self.hidden_axes == self.embed_axes:
            if not self.embed_axes:
                return y
            return jax.lax.psum_scatter(y, self.embed_axes, scatter_dimension=last, tiled=True)
        if self.hidden_axes:
            y = jax.lax.psum(y, self.hidden_axes)
        if self.embed_axes:
            size = y.shape[last] // self.size(self.embed_axes)
            start = jax.lax.axis_index(self.embed_axes) * size
            y = jax.lax.dynamic_slice_in_dim(y, start, size, axis=last)
        return y
