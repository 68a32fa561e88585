"""Parse how ENTRY parameters are split over devices, and the mesh that a text names.

Four notations of one thing:

    sharding={replicated}                                      every device has all of it
    sharding={devices=[4,1,2]<=[2,4]T(1,0) last_tile_dim_replicate}    parts per dim, device order
    sharding={devices=[2,1]0,1}                                parts per dim, devices listed
    sharding={mesh['data'=2,'expert'=4], [{'expert'}, {}]}     jax 0.11 and newer: axes by name

The module before optimization (jax 0.10) names its mesh in the header:
`frontend_attributes={xla.sdy.meshes={mesh = #sdy.mesh<["data"=2, "ep"=4]>}}`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_shard.lowering.hlo import HloParseError
from moe_shard.lowering.replica_groups import iota_ids

_TILED = re.compile(r"\{devices=\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))")
_MESH_SHARDING = re.compile(
    r"\{@?mesh\[([^\]]*)\](?:, device_ids=\(([^()]*(?:\([^()]*\))?[^()]*)\))?"
)
_MESH_AXIS = re.compile(r"['\"]([^'\"]+)['\"]=(\d+)")
_DIM_AXES = re.compile(r"\{([^{}]*)\}")
_AXIS_REF = re.compile(r"['\"]([^'\"]+)['\"](?::\((\d+)\)(\d+))?")
_SDY_MESH = re.compile(r"#sdy\.mesh<\[([^\]]*)\](?:, device_ids=\[([\d, ]*)\])?>")
_COUNTED = re.compile(r"<=\[([\d,]+)\]")
_MESH = re.compile(r"\bmesh\[([^\]]*)\]")
_MESH_GROUPS = re.compile(
    r"\bmesh\[([^\]]*)\](?:, device_ids=\(([^()]*(?:\([^()]*\))?[^()]*)\))? \{"
)
_ENTRY_PARAMETER = re.compile(r"parameter\((\d+)\), sharding=(\{(?:[^{}]|\{[^{}]*\})*\})")
_HEADER_MESHES = re.compile(r"xla\.sdy\.meshes=\{(.*)")
_LISTED = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")

PartGroups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class NamedMesh:
    """Hold a mesh as a text names it.

    Attributes:
        sizes: {axis: size} in the order in which the devices are laid out.
        device_ids: the device at each position, or None for 0, 1, 2, ...
    """

    sizes: dict[str, int]
    device_ids: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Return how many devices it has."""
        return math.prod(self.sizes.values())


@dataclass(frozen=True)
class Split:
    """Describe into how many parts each dim of an array is split, and over which devices.

    Attributes:
        parts: number of parts of each dim.
        device_groups: for each dim, groups of devices whose shards together cover that dim; empty
            for a dim that is whole.
    """

    parts: tuple[int, ...]
    device_groups: tuple[PartGroups, ...]


def parse_split(sharding: str, rank: int) -> Split | None:
    """Read the value of a `sharding=` attribute.

    Args:
        sharding: the value with its braces.
        rank: rank of the array.

    Returns:
        None where it is replicated, of another kind (manual, maximal), or does not fit the rank.
    """
    if named := _MESH_SHARDING.match(sharding):
        return _by_names(sharding, named, rank)
    tiled = _TILED.match(sharding)
    if tiled is None:
        return None
    tiles = _integers(tiled[1])
    if len(tiles) < rank:
        return None
    try:
        devices = _integers(tiled[4]) if tiled[4] else _ordered(tiled[2], tiled[3])
    except ValueError:
        return None
    if math.prod(tiles) != len(devices):
        return None
    return _split(tiles, devices, rank)


def _ordered(dims: str, permutation: str | None) -> list[int]:
    return iota_ids(_integers(dims), _integers(permutation or ""))


def _split(tiles: Sequence[int], devices: Sequence[int], rank: int) -> Split:
    """Group the devices of a row-major grid along each of its first `rank` dims."""
    groups: list[PartGroups] = []
    for dim in range(rank):
        if tiles[dim] == 1:
            groups.append(())
            continue
        stride = math.prod(tiles[dim + 1 :])
        starts = [at for at in range(len(devices)) if (at // stride) % tiles[dim] == 0]
        groups.append(
            tuple(
                tuple(devices[start + step * stride] for step in range(tiles[dim]))
                for start in starts
            )
        )
    return Split(tuple(tiles[:rank]), tuple(groups))


def _by_names(sharding: str, named: re.Match[str], rank: int) -> Split | None:
    mesh = _named_mesh(named[1], named[2])
    rest = sharding[named.end() :]
    opened = rest.find("[")
    if mesh is None or opened < 0:
        return None
    dims = _DIM_AXES.findall(rest[opened : rest.rfind("]")])
    if len(dims) != rank:
        return None
    # Every axis, cut where a dim uses only a part of it, is one dim of the grid of devices.
    wanted = [_AXIS_REF.findall(dim) for dim in dims]
    grid: list[int] = []
    place: dict[tuple[str, int], list[int]] = {}
    for axis, size in mesh.sizes.items():
        cuts = {1, size}
        for references in wanted:
            for name, before, part in references:
                if name == axis and part:
                    cuts |= {int(before), int(before) * int(part)}
        ordered = sorted(cuts)
        for low, high in itertools.pairwise(ordered):
            if high % low:
                return None
            place.setdefault((axis, 0), []).append(len(grid))
            place[axis, low] = [len(grid)]
            grid.append(high // low)
    order: list[int] = []
    tiles: list[int] = []
    for references in wanted:
        taken: list[int] = []
        for name, before, part in references:
            found = place.get((name, int(before) if part else 0))
            if name in mesh.sizes and mesh.sizes[name] == 1:
                continue
            if found is None:
                return None
            taken += found
        tiles.append(math.prod(grid[at] for at in taken))
        order += taken
    if len(set(order)) != len(order):
        return None
    others = [at for at in range(len(grid)) if at not in order]
    positions = iota_ids(grid, [*order, *others]) if grid else [0]
    devices = positions
    if mesh.device_ids is not None:
        devices = [mesh.device_ids[at] for at in positions]
    return _split([*tiles, math.prod(grid[at] for at in others)], devices, rank)


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _named_mesh(axes: str, device_ids: str | None) -> NamedMesh | None:
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(axes)}
    if not sizes:
        return None
    total = math.prod(sizes.values())
    devices: list[int] | None = None
    if device_ids is not None:
        try:
            listed = _LISTED.fullmatch(device_ids.strip())
            devices = (
                iota_ids(_integers(listed[2] or listed[1]), _integers(listed[3] or ""))
                if listed
                else _integers(device_ids)
            )
        except ValueError:
            return None
        if sorted(devices) != list(range(total)):
            return None
    return NamedMesh(sizes, tuple(devices) if devices is not None else None)


def mesh_of_shardings(shardings: Iterable[str], num_devices: int) -> NamedMesh | None:
    """Return the mesh that parameters' shardings name (jax 0.11 and newer), if they do.

    Args:
        shardings: values of `sharding=`.
        num_devices: devices of the module; a mesh of another size is ignored.
    """
    for sharding in shardings:
        if match := _MESH_SHARDING.match(sharding):
            mesh = _named_mesh(match[1], match[2])
            if mesh is not None and mesh.size == num_devices and has_names(mesh.sizes):
                return mesh
    return None


def mesh_of_groups(text: str, num_devices: int) -> NamedMesh | None:
    """Return the mesh that the groups of collectives name (jax 0.12), if they do.

    Other collectives of the same text use the partitioner's own axis_0, axis_1, ...
    """
    found = [
        mesh
        for axes, devices in sorted(set(_MESH_GROUPS.findall(text)))
        if (mesh := _named_mesh(axes, devices or None)) is not None
        and mesh.size == num_devices
        and has_names(mesh.sizes)
    ]
    return max(found, key=lambda mesh: len(mesh.sizes), default=None)


def has_names(axes: Iterable[str]) -> bool:
    """Return whether the axes have the user's names, not the partitioner's axis_0, axis_1, ..."""
    names = list(axes)
    return bool(names) and not any(re.fullmatch(r"axis_\d+", name) for name in names)


def mesh_before_optimization(text: str, num_devices: int) -> NamedMesh | None:
    """Return the mesh that the header of a module before optimization names.

    Args:
        text: the module, of which only the header is read.
        num_devices: devices of the program; a mesh of another size is ignored.

    Raises:
        HloParseError: the text is no HLO module.
    """
    header = text[: text.find("\n")] if "\n" in text else text
    if not header.startswith("HloModule"):
        raise HloParseError("not HLO text: it must begin with 'HloModule'")
    meshes = _HEADER_MESHES.search(header)
    for axes, devices in _SDY_MESH.findall(meshes[1]) if meshes else ():
        mesh = _named_mesh(axes, devices or None)
        if mesh is not None and mesh.size == num_devices:
            return mesh
    return None


def shardings_before_optimization(text: str) -> dict[int, str]:
    """Return {position: sharding} of the ENTRY parameters of a module before optimization.

    The optimized text of jax 0.12 has no shardings of parameters; this one has.
    """
    start = text.find("\nENTRY ")
    end = text.find("\n}", start)
    return {
        int(number): sharding
        for number, sharding in _ENTRY_PARAMETER.findall(text[start:end] if start >= 0 else "")
    }


def unnamed_mesh(text: str, num_devices: int) -> NamedMesh:
    """Return a mesh with axes axis_0, axis_1, ... that the text's groups of devices fit.

    The text arranges all devices in several shapes (`<=[2,4]`, `mesh['axis_0'=2,'axis_1'=4]`); the
    mesh is the coarsest one that refines all of them.
    """
    counted = {tuple(_integers(dims)) for dims in set(_COUNTED.findall(text))}
    for axes in set(_MESH.findall(text)):
        counted.add(tuple(int(size) for _, size in _MESH_AXIS.findall(axes)))
    strides = {1, num_devices}
    for dims in sorted(counted):
        if math.prod(dims) != num_devices:
            continue
        own = {math.prod(dims[at:]) for at in range(len(dims))} | strides
        if all(high % low == 0 for low, high in itertools.pairwise(sorted(own))):
            strides = own
    ordered = sorted(strides, reverse=True)
    sizes = [high // low for high, low in itertools.pairwise(ordered)]
    return NamedMesh({f"axis_{at}": size for at, size in enumerate(sizes)})
