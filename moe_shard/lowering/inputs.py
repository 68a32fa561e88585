"""Accept a program in any form: compiled, lowered, as text, or in a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from moe_shard.errors import UserError
from moe_shard.lowering.memory import memory_from_compiled
from moe_shard.lowering.sources import (
    before_optimization,
    dumped_memory,
    module_file,
    read_text,
    recorded_mesh,
)


class HasText(Protocol):
    """Stand for a `jax.stages.Compiled` or `Lowered`; jax is not needed to read texts."""

    def as_text(self) -> str | None:
        """Return the program's text."""


class HasShape(Protocol):
    """Stand for a `jax.sharding.Mesh` or `AbstractMesh`."""

    @property
    def shape(self) -> Mapping[str, int]:
        """Return the axes and their sizes."""


ProgramLike: TypeAlias = HasText | str | os.PathLike[str]
"""A compiled or lowered step; HLO text; or the path of an HLO file, a dump folder or a run folder.
A string that begins with "HloModule" or has several lines is text, any other string is a path."""

MeshLike: TypeAlias = HasShape | Mapping[str, int]
"""A jax mesh, or {axis: size} in the order in which the devices are laid out."""


@dataclass(frozen=True)
class ProgramText:
    """Hold what is known of a program before its text is parsed.

    Attributes:
        text: HLO after optimization.
        mesh: {axis: size} as given, or as the executable or the run's record names it; None where
            only the text can name it.
        before: the text before optimization, where there is one.
        memory: bytes per device as of `memory_from_compiled`, where it is known.
    """

    text: str
    mesh: dict[str, int] | None = None
    before: str | None = None
    memory: dict[str, int] | None = None


def mesh_sizes(mesh: MeshLike | None) -> dict[str, int] | None:
    """Return `{axis: size}` of a mapping or of a jax mesh; None stays None."""
    if mesh is None:
        return None
    sizes = mesh if isinstance(mesh, Mapping) else mesh.shape
    return {str(axis): int(size) for axis, size in sizes.items()}


def path_of(program: object) -> str | None:
    """Return the path that a program is given as; None for every other form."""
    if isinstance(program, os.PathLike):
        return str(Path(program))
    if not isinstance(program, str) or not program.strip():
        return None
    is_text = program.lstrip().startswith("HloModule") or "\n" in program.strip()
    return None if is_text else program


def read_program(
    program: ProgramLike, *, mesh: MeshLike | None = None, before: str | None = None
) -> ProgramText:
    """Read the text of a program, with the mesh and the memory where its form includes them.

    Args:
        program: the program in one of the forms of `ProgramLike`. A `jax.stages.Lowered` is
            compiled.
        mesh: the mesh of the program, where its form does not name it.
        before: the text of the module before optimization, where the caller has it.

    Raises:
        UserError: it is none of these, cannot be read, or has no text.
    """
    sizes = mesh_sizes(mesh)
    if (path := path_of(program)) is not None:
        file = module_file(path)
        return ProgramText(
            read_text(file),
            sizes or recorded_mesh(file),
            before or before_optimization(file),
            dumped_memory(file),
        )
    if isinstance(program, str):
        return ProgramText(program, sizes, before)
    if not hasattr(program, "as_text"):
        raise UserError(
            f"cannot read a program from a {type(program).__name__}\n"
            "fix: pass jax.jit(f).lower(...).compile(), its as_text(), or the path of an HLO file"
        )
    compiled: Any = program
    if hasattr(compiled, "compile"):  # a jax.stages.Lowered: collectives come with compilation
        before = before or compiled.as_text("hlo")
        compiled = compiled.compile()
    text = compiled.as_text()
    if not text:
        raise UserError(
            "the compiled program has no text: this backend does not print its HLO\n"
            "fix: compile with XLA_FLAGS=--xla_dump_to=DIR and pass DIR"
        )
    memory = memory_from_compiled(compiled) if hasattr(compiled, "memory_analysis") else None
    return ProgramText(text, sizes or _mesh_of(compiled), before, memory)


def _mesh_of(compiled: Any) -> dict[str, int] | None:
    """Return the mesh that a compiled program's inputs and outputs lie on; None if not just one.

    Text of jax before 0.11 does not name the mesh, but the executable's shardings do.
    """
    if not hasattr(compiled, "input_shardings"):
        return None
    import jax  # loaded already, or there would be no executable

    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    meshes = {
        tuple(sharding.mesh.shape.items())
        for sharding in shardings
        if isinstance(sharding, jax.sharding.NamedSharding)
    }
    return dict(meshes.pop()) if len(meshes) == 1 else None
