"""Place the optimizer's state: as its parameters, or over the data axis as well (ZeRO-1).

Parameters that are replicated over data are updated by every device of it alike. With ZeRO
(arXiv 1910.02054, stage 1) each device holds and updates one part of them: gradients are summed
into parts, and the parts of the new parameters are gathered when the next step uses them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from moe_shard.models.params import Params, ParamSpec
from moe_shard.program.matrices import matrix_dims, matrix_entries, matrix_shape, spec_entries
from moe_shard.sharding.annotate import axes_of

DATA = "data"
HOST = "pinned_host"
"""jax's name of the host's memory that devices read and write directly."""


def over_data(specs: Params) -> tuple[Params, tuple[str, ...]]:
    """Place parameters over the data axis in addition to their own axes.

    Args:
        specs: the parameters' `ParamSpec`s, all on one mesh.

    Returns:
        The same with the new placement, and the names of those that no dim can take it.
    """
    names: list[str] = []

    def placed(spec: ParamSpec) -> ParamSpec:
        found = _with_data(spec)
        if found is None:
            names.append(spec.name)
            return spec
        return dataclasses.replace(spec, sharding=found)

    return jax.tree.map(placed, specs), tuple(names)


def _with_data(spec: ParamSpec) -> NamedSharding | None:
    """Return a placement with the data axis; the dim is unsharded where there is such a one.

    The dim of layers comes last: a gradient is made layer by layer, and could not be summed into
    parts where it is made.
    """
    entries = [axes_of(entry) for entry in spec_entries(spec)]
    mesh = spec.sharding.mesh
    if any(DATA in entry for entry in entries):
        return spec.sharding

    def cost(dim: int) -> tuple[bool, int, int]:
        stacked = spec.logical_axes[dim] == "layers"
        return stacked, _parts(mesh, entries[dim]), -spec.shape[dim]

    for dim in sorted(range(len(entries)), key=cost):
        parts = _parts(mesh, entries[dim]) * mesh.shape[DATA]
        if spec.logical_axes[dim] is not None and spec.shape[dim] % parts == 0:
            entries[dim] = (*entries[dim], DATA)
            return spec.sharding.update(spec=PartitionSpec(*map(_entry, entries)))
    return None


def _entry(axes: tuple[str, ...]) -> Any:
    return axes[0] if len(axes) == 1 else axes or None


def _parts(mesh: Any, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def place_state(
    shapes: Any, specs: Params, replicated: NamedSharding, *, memory: str | None = None
) -> Any:
    """Place the state of any optimizer whose trees are in the form of the parameters.

    Args:
        shapes: the state's `ShapeDtypeStruct`s.
        specs: the parameters' `ParamSpec`s, placed as their moments shall be.
        replicated: placement of everything else.
        memory: memory that the moments live in, e.g. "pinned_host"; None: the device's own.

    Returns:
        The same with shardings: an array of a parameter's shape as the parameter, its factors as
        the dims that they have, everything else replicated.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(specs)
    by_path = {_names(path): spec for path, spec in flat}

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = by_path.get(_names(path))
        placed = replicated
        if spec is not None:
            entries = _state_entries(spec, leaf.shape)
            if entries is not None:
                placed = spec.sharding.update(spec=PartitionSpec(*entries))
                placed = placed.with_memory_kind(memory) if memory else placed
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    return jax.tree_util.tree_map_with_path(place, shapes)


def on_device(state: Any, places: Any) -> Any:
    """Return a state in the device's own memory, for the update; what is there stays.

    Args:
        state: arrays.
        places: their shardings.
    """

    def moved(leaf: Any, place: NamedSharding) -> Any:
        if place.memory_kind in (None, "device"):
            return leaf
        return jax.device_put(leaf, place.with_memory_kind("device"))

    return jax.tree.map(moved, state, places)


def _names(path: Sequence[Any]) -> tuple[str, ...]:
    """Return the parameter's name in a path: the keys of dicts at its end."""
    names: list[str] = []
    for key in reversed(path):
        if not isinstance(key, jax.tree_util.DictKey):
            break
        names.append(key.key)
    return tuple(reversed(names))


def _state_entries(spec: ParamSpec, shape: tuple[int, ...]) -> list[Any] | None:
    """Return the mesh axes of the dims of one array of the state; None: replicated."""
    if shape == spec.shape:
        return spec_entries(spec)
    if matrix_dims(spec) is None:
        return None
    stacked, inputs, outputs = matrix_entries(spec)
    for size, entry in zip(matrix_shape(spec), (inputs, outputs), strict=True):
        if len(shape) == len(stacked) + 1 and shape[-1] == size:
            return [*stacked, entry]
    return None
