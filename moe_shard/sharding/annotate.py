"""Place the arrays of layers: `Sharding` is made once, from a mesh and a rule table.

Layers name logical axes; only the table knows the mesh. What was decided for each array is
recorded, so that a report can be written once a program has been traced.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import jax
from jax._src import source_info_util
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from moe_shard.config.mesh_config import EXPERT_RULES, MESH_AXES
from moe_shard.errors import UserError
from moe_shard.sharding.rules import LogicalAxes, Resolution, RuleTable

# A collective's source line should be where a tensor was annotated, not the line here that
# calls JAX; this is how jax keeps its own files out of tracebacks, and there is no public way.
source_info_util.register_exclusion(__file__)

RuleConflicts = Literal["warn", "record", "error"]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(w: Array, stored: NamedSharding, used: NamedSharding, _sum_where_used: bool) -> Array:
    """Lay `w` out as it is used; lay its gradient out as `w` is stored, with no step in between.

    The gradient of two constraints would constrain the partial sums to the layout of use first, and
    where a cast comes in between, GPUs then all-reduce them instead of scattering them. With
    `_sum_where_used` that step is made nevertheless, here, where no cast can come in between.
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


def with_auto_axes(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """Return the mesh with Auto axes, which annotations need.

    Raises:
        UserError: it has Manual axes.
    """
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    if AxisType.Manual in mesh.axis_types:
        raise UserError(
            f"Sharding: the mesh has Manual axes ({mesh.axis_types})\n"
            "fix: give it the mesh from outside of shard_map"
        )
    if mesh.axis_types == kinds:
        return mesh
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
    return mesh.update_axis_types(dict(zip(mesh.axis_names, kinds, strict=True)))


def _outside_of_package() -> int:
    """Count the frames up to the first that is neither in this package nor in a library."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level


_LIBRARIES = ("moe_shard", "jax", "flax")


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the mesh axes of one dim of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def axes_by_dim(spec: PartitionSpec, dims: int) -> list[tuple[str, ...]]:
    """Return the mesh axes of each dim; a PartitionSpec may end before the last dim."""
    return [axes_of(entry) for entry in (*spec, *[None] * (dims - len(spec)))]


def spec_of(*axes: tuple[str, ...]) -> PartitionSpec:
    """Make a PartitionSpec of the mesh axes of each dim."""
    return PartitionSpec(*(entry or None for entry in axes))


@dataclass(frozen=True)
class AnnotatedArray:
    """Hold what was declared of an array when it was placed.

    Attributes:
        name: the name in reports.
        logical_axes: a name per dim, or None for a dim that is never sharded.
        shape: the dims' sizes on all devices together.
        dtype: None where it was not declared.
        consequence: see `Sharding.__call__`.
    """

    name: str
    logical_axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: DTypeLike | None
    consequence: str


@dataclass(frozen=True)
class Conflict:
    """Describe a dim that the table would shard and that stays unsharded.

    Attributes:
        array: the array's name.
        dim: the logical axis of the dim.
        cause: which rule lost which mesh axes to which other dim.
        consequence: what that means, and the fix; the fix alone where the layer states neither.
    """

    array: str
    dim: str
    cause: str
    consequence: str

    def __str__(self) -> str:
        return f"{self.array}: dim '{self.dim}' stays unsharded: {self.cause}; {self.consequence}"


class Sharding:
    """Place arrays on a mesh by the logical axes of their dims, as a rule table maps them.

    >>> import jax, moe_shard as ms
    >>> sharding = ms.Sharding(ms.make_mesh(data=2, expert=4), ms.RuleTable.default())
    >>> sharding.named_sharding("x", ("activation_batch_moe", None, None), (8, 16, 32)).spec
    P(('data', 'expert'), None, None)
    >>> same = ms.Sharding(jax.make_mesh((2, 4), ("data", "expert")))  # the default table
    >>> same.named_sharding("w", ("exp", "embed_moe", "mlp_moe"), (8, 32, 64)).spec
    P('expert', None, None)

    Axes of `make_mesh` that the mesh lacks count as size 1, so a table that names them works
    on smaller meshes too. A mesh with Explicit axes works as well: layers then annotate the same
    mesh with Auto axes inside `jax.sharding.auto_axes`, see `MoELayer`.

    Two are equal if their mesh, rules and `rule_conflicts` are; what they record while programs are
    traced (`arrays`, `resolutions`, `conflicts`) is not compared.

    Args:
        mesh: the device mesh; an abstract one is enough for programs that are only traced.
        rules: the rule table; the default one if not given.
        rule_conflicts: what happens where the table would shard a dim that another dim of its array
            leaves unsharded. "warn": it is recorded, with a `UserWarning` the first time. "record":
            it is only recorded, for reports of `conflict_lines`. "error": a `UserError` is raised.

    Raises:
        UserError: the table names a mesh axis that neither the mesh nor `make_mesh` has, or an
            argument is of another kind.
    """

    def __init__(
        self,
        mesh: Mesh | AbstractMesh,
        rules: RuleTable | None = None,
        rule_conflicts: RuleConflicts = "warn",
    ) -> None:
        self.rules = RuleTable.default() if rules is None else rules
        if not isinstance(self.rules, RuleTable):
            raise UserError(
                f"Sharding: rules is a {type(rules).__name__}\nfix: RuleTable(rules), or "
                "RuleTable.from_yaml(path) of a file"
            )
        if rule_conflicts not in get_args(RuleConflicts):
            raise UserError(
                f"Sharding: rule_conflicts={rule_conflicts!r}\n"
                f"fix: one of {', '.join(get_args(RuleConflicts))}"
            )
        if not isinstance(mesh, Mesh | AbstractMesh) or not mesh.axis_names:
            raise UserError(f"Sharding: {mesh!r} is not a mesh\nfix: make_mesh(data=2, expert=4)")
        self.given_mesh = mesh
        self.mesh = with_auto_axes(mesh)
        self.rule_conflicts = rule_conflicts
        missing = {axis: 1 for axis in MESH_AXES if axis not in mesh.shape}
        self.table = self.rules.on({**mesh.shape, **missing})
        self.arrays: dict[str, AnnotatedArray] = {}
        self.resolutions: dict[str, Resolution] = {}
        self.conflicts: dict[tuple[str, str], Conflict] = {}
        self._key = (mesh, self.rules, rule_conflicts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sharding) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items() if size > 1)
        return f"Sharding({sizes or 'one device'}; {self.rules}; {self.rule_conflicts})"

    @property
    def is_explicit(self) -> bool:
        """Return whether array types carry shardings: Explicit axes, and no Auto ones in force."""
        if self.given_mesh == self.mesh:
            return False
        current = jax.sharding.get_abstract_mesh()
        return current.empty or AxisType.Explicit in current.axis_types

    def outside(self, placed: NamedSharding) -> NamedSharding:
        """Return the same placement on the mesh as given, for inputs and outputs of layers."""
        return NamedSharding(self.given_mesh, placed.spec)

    @property
    def device(self) -> jax.Device | None:
        """Return the first device of the mesh; None for an abstract mesh."""
        return None if isinstance(self.mesh, AbstractMesh) else self.mesh.devices.flat[0]

    @property
    def platform(self) -> str:
        """Return "cpu", "tpu", "cuda" or "rocm"; "unknown" for an abstract mesh."""
        device = self.device
        if device is None:
            return "unknown"
        if device.platform != "gpu":
            return str(device.platform)
        # A card that is there says "rocm"; one that is compiled for says only whose it is.
        said = device.client.platform_version.lower()
        return "rocm" if "rocm" in said or "amd" in said.split() else "cuda"

    def __call__(
        self, x: Array, *logical_axes: str | None, name: str, consequence: str = ""
    ) -> Array:
        """Constrain `x` to the placement of its logical axes, or reshard it by type.

        >>> import jax.numpy as jnp, moe_shard as ms
        >>> sharding = ms.Sharding(ms.make_mesh(data=2, expert=4, explicit=True))
        >>> sharding(jnp.ones((8, 16)), "activation_batch", None, name="x").sharding.spec
        P(('data', 'expert'), None)

        Where the mesh has Explicit axes, the result has the placement in its type (unless the
        caller runs under `jax.sharding.auto_axes`, as the body of a `MoELayer` does).

        Args:
            x: an array with as many dims as logical axes are given.
            logical_axes: a name per dim, or None for a dim that is never sharded.
            name: the name of the array in reports.
            consequence: what follows if the first dim cannot be sharded, and, after a semicolon,
                the fix.

        Raises:
            UserError: see `RuleTable.resolve`; or a conflict where `rule_conflicts` is "error".
        """
        sharding = self.named_sharding(
            name, logical_axes, x.shape, dtype=x.dtype, consequence=consequence
        )
        if self.is_explicit:
            return jax.sharding.reshard(x, self.outside(sharding))
        return jax.lax.with_sharding_constraint(x, sharding)

    def use_weight(self, w: Array, stored: LogicalAxes, used: LogicalAxes, *, name: str) -> Array:
        """Bring a parameter from where it is stored to where a product needs it.

        This is FSDP, written out rather than left to the partitioner. Constrained as it is stored,
        a cast before this call runs on the shards, and the narrow dtype is what is gathered.
        Constrained as it is used, a weight in a product is never sharded over the axes of the
        product's batch dim: XLA miscompiles that where the batch dim is on two axes (data, fsdp),
        the contracted dim on a third (tensor), the weight's other dim on fsdp and the result's on
        tensor. Half of the rows come out wrong, without an error, for an einsum of two matrices
        too; seen on CPU with jax 0.10.2 and 0.12.0, in every order of the axes.

        Args:
            w: the parameter, cast to the dtype of the product.
            stored: its logical axes as a parameter.
            used: the logical axes it is used with: the embedding dim unsharded, the others as in
                the activations it is multiplied with.
            name: the name of the parameter in reports.

        Raises:
            UserError: see `RuleTable.resolve`.
        """
        where = self.named_sharding(f"{name} as stored", stored, w.shape, dtype=w.dtype)
        use = self.named_sharding(f"{name} in use", used, w.shape, dtype=w.dtype)
        # Experts stored over (expert, fsdp) and used over expert: straight from partial sums, the
        # partitioner would gather all experts' gradients over expert, and with a data axis leave
        # half of the sum out (openxla/xla#40034). From the layout of use it only slices.
        extended = any(
            axis in EXPERT_RULES and set() < set(axes_of(by_use)) < set(axes_of(by_store))
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
        """Return the sharding of an array that may not exist yet, such as a parameter."""
        self.arrays[name] = AnnotatedArray(
            name, tuple(logical_axes), tuple(shape), dtype, consequence
        )
        return NamedSharding(self.mesh, self._resolve(name, logical_axes, shape, consequence))

    def spec(self, name: str, logical_axes: LogicalAxes, shape: Sequence[int]) -> PartitionSpec:
        """Return the spec of an array that is recorded elsewhere, under a name of its own."""
        return self.table.resolve(name, logical_axes, shape).spec

    def _resolve(
        self, name: str, logical_axes: LogicalAxes, shape: Sequence[int], consequence: str, /
    ) -> PartitionSpec:
        """Resolve one array by the table, and record what it decided."""
        resolution = self.table.resolve(name, logical_axes, shape)
        self.resolutions[name] = resolution
        for decision in resolution.conflicts:
            loss, dim = decision.lost[0], decision.logical_axis or ""
            means = consequence if dim == logical_axes[0] else ""
            means = means or (
                f"leave {', '.join(loss.taken)} out of the rule of '{loss.held_by}', or add a rule "
                f"of '{dim}' with other mesh axes"
            )
            conflict = Conflict(name, dim, str(loss), means)
            if self.rule_conflicts == "error":
                raise UserError(f"rule_conflicts=error: {conflict}")
            known = {replace(each, array="") for each in self.conflicts.values()}
            self.conflicts[name, conflict.dim] = conflict
            if self.rule_conflicts == "warn" and replace(conflict, array="") not in known:
                warnings.warn(str(conflict), UserWarning, stacklevel=_outside_of_package())
        return resolution.spec

    def conflict_lines(self) -> list[str]:
        """Return the conflicts, one line for all arrays that share cause and consequence."""
        arrays: dict[Conflict, list[str]] = {}
        for conflict in self.conflicts.values():
            arrays.setdefault(replace(conflict, array=""), []).append(conflict.array)
        return [str(replace(key, array=", ".join(names))) for key, names in arrays.items()]
