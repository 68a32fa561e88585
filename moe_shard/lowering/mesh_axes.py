"""Translate groups of device numbers back to the axes of the user's mesh."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from moe_shard.errors import UserError

UNKNOWN_AXES = ("?",)


class MeshAxes:
    """Find the mesh axes that a set of groups runs along.

    Device `device_ids[i]` is at position i of the mesh, in row-major order of its axes.
    """

    def __init__(
        self, mesh: Mapping[str, int], num_devices: int, device_ids: Sequence[int] | None = None
    ) -> None:
        """Check the mesh against the module.

        Raises:
            UserError: when the mesh and the module have different numbers of devices.
        """
        size = math.prod(mesh.values())
        if size != num_devices:
            axes = ",".join(f"{axis}={count}" for axis, count in mesh.items())
            raise UserError(
                f"mesh {axes} has {size} devices, but the module was compiled for {num_devices}"
            )
        ids = list(range(num_devices)) if device_ids is None else list(device_ids)
        if sorted(ids) != list(range(num_devices)):
            raise UserError(f"device_ids must hold each of 0..{num_devices - 1} once")
        self._axes = [axis for axis, count in mesh.items() if count > 1]
        self._sizes = [count for count in mesh.values() if count > 1]
        positions = itertools.product(*map(range, self._sizes))
        self._coordinates = dict(zip(ids, positions, strict=True))
        self._found: dict[frozenset[frozenset[int]], tuple[str, ...]] = {}

    def of_groups(self, groups: Iterable[Iterable[int]]) -> tuple[str, ...]:
        """Return the axes whose groups are exactly `groups`; `("?",)` where there are none."""
        wanted = frozenset(frozenset(group) for group in groups)
        if wanted not in self._found:
            self._found[wanted] = self._search(wanted)
        return self._found[wanted]

    def of_pairs(self, pairs: Iterable[tuple[int, int]]) -> tuple[str, ...]:
        """Return the axes along which any source and target of a permute differ."""
        moved: set[int] = set()
        for source, target in pairs:
            if source not in self._coordinates or target not in self._coordinates:
                return UNKNOWN_AXES
            here, there = self._coordinates[source], self._coordinates[target]
            moved |= {axis for axis in range(len(here)) if here[axis] != there[axis]}
        return tuple(self._axes[axis] for axis in sorted(moved))

    def _search(self, wanted: frozenset[frozenset[int]]) -> tuple[str, ...]:
        sizes = {len(group) for group in wanted}
        for count in range(len(self._axes) + 1):
            for chosen in itertools.combinations(range(len(self._axes)), count):
                if sizes != {math.prod(self._sizes[axis] for axis in chosen)}:
                    continue
                if self._groups_along(chosen) == wanted:
                    return tuple(self._axes[axis] for axis in chosen)
        return UNKNOWN_AXES

    def _groups_along(self, chosen: tuple[int, ...]) -> frozenset[frozenset[int]]:
        groups: dict[tuple[int, ...], set[int]] = {}
        for device, place in self._coordinates.items():
            key = tuple(at for axis, at in enumerate(place) if axis not in chosen)
            groups.setdefault(key, set()).add(device)
        return frozenset(map(frozenset, groups.values()))
