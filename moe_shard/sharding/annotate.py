"""The one object through which layers place arrays: made once from a mesh and a rule table.

Layers speak of logical axes; only the table knows the mesh. What was decided for each array is
kept, so that a report can be written once a program has been traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax._src import source_info_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from moe_shard.config.mesh_config import EXPERT_ROWS
from moe_shard.errors import UserError
from moe_shard.sharding.rules import LogicalAxes, Resolution, RuleTable

# A collective's source line should be where a tensor was annotated, not the line here that asks
# JAX for it; this is how jax keeps its own files out of tracebacks, and there is no public way.
source_info_util.register_exclusion(__file__)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(w: Array, stored: NamedSharding, used: NamedSharding, _sum_where_used: bool) -> Array:
    """`w` where it is used. Its gradient is pinned where `w` is stored, and nowhere before.

    The gradient of two constraints would pin the partial sums whole first, and where a cast stands
    between, GPUs then reduce all of it on every device instead of scattering it. With
    `_sum_where_used` it is pinned so all the same, here where no cast can stand between.
    """
    constrain = jax.lax.with_sharding_constraint
    return constrain(constrain(w, stored), used)


def _gather_fwd(
    w: Array, stored: NamedSharding, used: NamedSharding, sum_where_used: bool
) -> tuple[Array, None]:
    return _gather(w, stored, used, sum_where_used), None


def _gather_bwd(
    stored: NamedSharding,
    used: NamedSharding,
    sum_where_used: bool,
    _residual: None,
    gradient: Array,
) -> tuple[Array]:
    constrain = jax.lax.with_sharding_constraint
    if sum_where_used:
        gradient = constrain(gradient, used)
    return (constrain(gradient, stored),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def _axes(entry: str | tuple[str, ...] | None) -> set[str]:
    """The mesh axes of one dim of a PartitionSpec."""
    return set() if entry is None else {entry} if isinstance(entry, str) else set(entry)


@dataclass(frozen=True)
class AnnotatedArray:
    """What was said of an array when it was placed.

    Attributes:
        name: what reports call it.
        logical_axes: a name per dim, or None for a dim that is never sharded.
        shape: the dims' sizes on all devices together.
        dtype: None where it was not said.
        consequence: see `Sharding.__call__`.
    """

    name: str
    logical_axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: DTypeLike | None
    consequence: str


@dataclass(frozen=True)
class Conflict:
    """A dim that the table wanted sharded and that stays unsharded.

    Attributes:
        array: the array's name.
        dim: the logical axis of the dim.
        cause: which row lost which mesh axes to which other dim.
        consequence: what that means, and the cure if there is one; may be empty.
    """

    array: str
    dim: str
    cause: str
    consequence: str

    def __str__(self) -> str:
        text = f"{self.array}: dim '{self.dim}' stays unsharded: {self.cause}"
        return f"{text}; {self.consequence}" if self.consequence else text


class Sharding:
    """Constrains arrays by logical axis names and records every decision.

    Args:
        mesh: the device mesh; an abstract one will do for what is only traced.
        rows: the rule table.
        on_conflict: "warn" records a conflict; "error" raises it.

    Raises:
        UserError: the table names a mesh axis that the mesh does not have.
    """

    def __init__(
        self,
        mesh: Mesh | AbstractMesh,
        rows: Sequence[tuple[str, Sequence[str]]],
        on_conflict: str = "warn",
    ) -> None:
        self.mesh = mesh
        self.table = RuleTable(rows, dict(mesh.shape))
        self.on_conflict = on_conflict
        self.arrays: dict[str, AnnotatedArray] = {}
        self.resolutions: dict[str, Resolution] = {}
        self.conflicts: dict[tuple[str, str], Conflict] = {}
        self.decisions: dict[str, Any] = {}

    @property
    def platform(self) -> str:
        """What the devices are: "cpu", "tpu", "cuda", "rocm", or "unknown" of an abstract mesh."""
        if isinstance(self.mesh, AbstractMesh):
            return "unknown"
        device = self.mesh.devices.flat[0]
        if device.platform != "gpu":
            return str(device.platform)
        return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"

    def __call__(
        self, x: Array, *logical_axes: str | None, name: str, consequence: str = ""
    ) -> Array:
        """Constrain `x` to the placement of its logical axes.

        Args:
            x: an array with as many dims as logical axes are given.
            logical_axes: a name per dim, or None for a dim that is never sharded.
            name: what reports call the array.
            consequence: what it means if the first dim cannot be sharded, and, after a semicolon,
                the cure.

        Raises:
            UserError: see `RuleTable.resolve`; or a conflict where `on_conflict` is "error".
        """
        sharding = self.named_sharding(
            name, logical_axes, x.shape, dtype=x.dtype, consequence=consequence
        )
        return jax.lax.with_sharding_constraint(x, sharding)

    def use_weight(self, w: Array, stored: LogicalAxes, used: LogicalAxes, *, name: str) -> Array:
        """Bring a parameter from where it is stored to where a product needs it.

        What FSDP does, said rather than left to the partitioner. Pinned where it is stored, a
        cast before this call is made on the shards, and the narrow dtype is what is gathered.
        Pinned where it is used, a product never meets a weight that is sharded over the axes of
        its own batch dim: XLA miscompiles that where the batch dim is on two axes (data, fsdp),
        the contracted dim on a third (tensor), the weight's other dim on fsdp and the result's on
        tensor. Half of the rows come out wrong, without a word, for an einsum of two matrices
        too; seen on CPU with jax 0.10.2 and 0.12.0, in every order of the axes.

        Args:
            w: the parameter, cast to the dtype of the product.
            stored: its logical axes as a parameter.
            used: those it is used with: the embedding dim whole, the others as the activations
                they meet.
            name: what reports call the parameter.

        Raises:
            UserError: see `RuleTable.resolve`.
        """
        where = self.named_sharding(f"{name} as stored", stored, w.shape, dtype=w.dtype)
        use = self.named_sharding(f"{name} in use", used, w.shape, dtype=w.dtype)
        # Experts stored over (expert, fsdp) and used over expert: straight from partial sums, the
        # partitioner would gather all experts' gradients over expert, and with a data axis leave
        # half of the sum out (openxla/xla#40034). From where they are used it has but to slice.
        extended = any(
            axis in EXPERT_ROWS and set() < _axes(by_use) < _axes(by_store)
            for axis, by_store, by_use in zip(used, where.spec, use.spec, strict=False)
        )
        return _gather(w, where, use, extended)

    def named_sharding(
        self,
        name: str,
        logical_axes: LogicalAxes,
        shape: Sequence[int],
        *,
        dtype: DTypeLike | None = None,
        consequence: str = "",
    ) -> NamedSharding:
        """The sharding of an array of this shape; for what is not yet there, such as parameters."""
        self.arrays[name] = AnnotatedArray(
            name, tuple(logical_axes), tuple(shape), dtype, consequence
        )
        resolution = self.table.resolve(name, logical_axes, shape)
        self.resolutions[name] = resolution
        for decision in resolution.conflicts:
            cause = str(decision.lost[0])
            means = consequence if decision.logical_axis == logical_axes[0] else ""
            conflict = Conflict(name, decision.logical_axis or "", cause, means)
            if self.on_conflict == "error":
                raise UserError(f"rule_conflicts=error: {conflict}")
            self.conflicts[name, conflict.dim] = conflict
        return NamedSharding(self.mesh, resolution.spec)

    def conflict_lines(self) -> list[str]:
        """The conflicts, a line for all arrays that share cause and consequence."""
        arrays: dict[Conflict, list[str]] = {}
        for conflict in self.conflicts.values():
            arrays.setdefault(replace(conflict, array=""), []).append(conflict.array)
        return [str(replace(key, array=", ".join(names))) for key, names in arrays.items()]
