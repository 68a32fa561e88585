"""Parse the three notations of replica groups, and the source-target pairs of a permute.

{{0,1},{2,3}}                                   listed; {} means all devices in one group
[4,2]<=[2,4]T(1,0)                              iota: 0..7 as [2,4], transposed, cut into groups
mesh['axis_0'=2,'axis_1'=4] {'axis_1'}          the groups along some axes of the op's own mesh
mesh['a'=8], device_ids=([2,4]T(1,0)) {'a':(2)4}    that mesh permuted; a part of an axis
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from moe_shard.lowering.hlo import HloParseError

DeviceGroups = list[list[int]]

_LISTED = re.compile(r"\{(?:\{[\d, ]*\}(?:, ?\{[\d, ]*\})*)?\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"@?mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? ?\{(.*)\}")
_MESH_AXIS = re.compile(r"['\"]([^'\"]+)['\"]=(\d+)")
_AXIS_REF = re.compile(r"['\"]([^'\"]+)['\"](?::\((\d+)\)(\d+))?")
_DEVICES = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


def parse_groups(text: str, num_devices: int) -> DeviceGroups:
    """Parse groups of device ids, in the order in which they are written.

    Args:
        text: the value of `replica_groups`.
        num_devices: how many devices run the module; `{}` means all of them.

    Raises:
        HloParseError: for an unknown notation, or one that is inconsistent.
    """
    try:
        groups = _parse(text.strip(), num_devices)
    except HloParseError:
        raise
    except (ValueError, IndexError, KeyError, ZeroDivisionError) as error:
        raise HloParseError(f"replica groups do not add up: {text[:80]}") from error
    members = [device for group in groups for device in group]
    if len(set(members)) != len(members) or not members or max(members) >= num_devices:
        raise HloParseError(f"replica groups do not fit {num_devices} devices: {text[:80]}")
    return groups


def parse_pairs(text: str) -> list[tuple[int, int]]:
    """Parse the source-target pairs of a collective-permute, `{{0,1},{1,0}}`.

    Raises:
        HloParseError: when the text is not a list of pairs.
    """
    if not _LISTED.fullmatch(text.strip()):
        raise HloParseError(f"unknown notation of source-target pairs: {text[:80]}")
    pairs = [_integers(pair) for pair in re.findall(r"\{([\d, ]+)\}", text)]
    if any(len(pair) != 2 for pair in pairs):
        raise HloParseError(f"source-target pairs are not pairs: {text[:80]}")
    return [(pair[0], pair[1]) for pair in pairs]


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _parse(text: str, num_devices: int) -> DeviceGroups:
    if _LISTED.fullmatch(text):
        listed = [_integers(group) for group in re.findall(r"\{([\d, ]+)\}", text)]
        return listed or [list(range(num_devices))]
    if iota := _IOTA.fullmatch(text):
        shape = _integers(iota[1])
        devices = iota_ids(_integers(iota[2]), _integers(iota[3] or ""))
        if math.prod(shape) != len(devices):
            raise ValueError("the two shapes differ in size")
        width = shape[-1] if len(shape) > 1 else len(devices)
        return [devices[start : start + width] for start in range(0, len(devices), width)]
    if mesh := _MESH.fullmatch(text):
        return _mesh_groups(mesh[1], mesh[2], mesh[3])
    raise HloParseError(f"unknown notation of replica groups: {text[:80]}")


def iota_ids(dims: Sequence[int], permutation: Sequence[int] = ()) -> list[int]:
    """Return 0, 1, 2, ... shaped as `dims`, its dims permuted, read in row-major order."""
    if not permutation:
        return list(range(math.prod(dims)))
    if sorted(permutation) != list(range(len(dims))):
        raise ValueError("not a permutation of the dims")
    ids = [0]
    for dim in permutation:
        stride = math.prod(dims[dim + 1 :])
        ids = [base + step * stride for base in ids for step in range(dims[dim])]
    return ids


def _mesh_groups(axes_text: str, devices_text: str | None, refs_text: str) -> DeviceGroups:
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(axes_text)}
    total = math.prod(sizes.values())
    devices = _mesh_devices(devices_text, total)
    # Split every axis that is used in part, so that each part is an axis of its own.
    dims: list[int] = []
    chosen: list[int] = []
    parts: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in _AXIS_REF.findall(refs_text):
        parts.setdefault(name, []).append((int(before or 1), int(size or sizes[name])))
    for name, axis_size in sizes.items():
        done = 1
        for before, size in sorted(parts.pop(name, [])):
            dims.append(before // done)
            chosen.append(len(dims))
            dims.append(size)
            done = before * size
        dims.append(axis_size // done)
    if parts or math.prod(dims) != total:
        raise ValueError("an axis is not in the mesh, or its part does not divide it")
    others = [dim for dim in range(len(dims)) if dim not in chosen]
    order = iota_ids(dims, [*others, *chosen])
    width = math.prod(dims[dim] for dim in chosen)
    return [
        [devices[position] for position in order[start : start + width]]
        for start in range(0, total, width)
    ]


def _mesh_devices(text: str | None, total: int) -> list[int]:
    if text is None:
        return list(range(total))
    if iota := _DEVICES.fullmatch(text.strip()):
        devices = iota_ids(_integers(iota[2] or iota[1]), _integers(iota[3] or ""))
    else:
        devices = _integers(text)
    if len(devices) != total:
        raise ValueError("the mesh has another number of devices than there are device ids")
    return devices
