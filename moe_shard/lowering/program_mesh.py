"""Find the mesh that a program was compiled for: given, named in its text, or inferred from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moe_shard.lowering.hlo import HloParseError, Module
from moe_shard.lowering.shardings import (
    NamedMesh,
    mesh_before_optimization,
    mesh_of_groups,
    mesh_of_shardings,
    shardings_before_optimization,
    unnamed_mesh,
)


@dataclass(frozen=True)
class ProgramMesh:
    """Hold a mesh and where it is known from.

    Attributes:
        sizes: {axis: size} in the order in which the devices are laid out.
        device_ids: the device at each position; None for 0, 1, 2, ...
        origin: "given" by the caller; "text", the parameters' shardings (jax 0.11 and newer);
            "before", the module before optimization; "unnamed", where only sizes are known, as
            axis_0, axis_1, ...
    """

    sizes: dict[str, int]
    device_ids: tuple[int, ...] | None
    origin: Literal["given", "text", "before", "unnamed"]


def program_mesh(
    module: Module,
    text: str,
    given: Mapping[str, int] | None = None,
    device_ids: Sequence[int] | None = None,
    before: str | None = None,
) -> ProgramMesh:
    """Find the mesh of a program.

    Args:
        module: the program.
        text: the text that it was parsed from.
        given: {axis: size} as the caller knows it; it is used as it is.
        device_ids: the device at each position of `given`.
        before: the text of the module before optimization, where there is one.
    """
    if given is not None:
        ids = None if device_ids is None else tuple(device_ids)
        return ProgramMesh(dict(given), ids, "given")
    shardings = [each.attributes.get("sharding", "") for each in module.entry.parameters()]
    if named := mesh_of_shardings(shardings, module.num_devices):
        return _found(named, "text")
    if named := mesh_of_groups(text, module.num_devices):
        return _found(named, "text")
    if before is not None:
        try:
            named = mesh_before_optimization(before, module.num_devices)
        except HloParseError:
            named = None
        listed = shardings_before_optimization(before).values()
        if named or (named := mesh_of_shardings(listed, module.num_devices)):
            return _found(named, "before")
    return _found(unnamed_mesh(text, module.num_devices), "unnamed")


def _found(mesh: NamedMesh, origin: Literal["text", "before", "unnamed"]) -> ProgramMesh:
    return ProgramMesh(mesh.sizes, mesh.device_ids, origin)
