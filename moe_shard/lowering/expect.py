"""What a program should do, as an assertion in anyone's test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_shard.lowering.collectives import Collective, extract_collectives


def mesh_sizes(mesh: Any) -> dict[str, int] | None:
    """`{axis: size}` of a mapping or of a jax mesh; None stays None."""
    if mesh is None:
        return None
    sizes: Mapping[str, int] = mesh if isinstance(mesh, Mapping) else mesh.shape
    return {str(axis): int(size) for axis, size in sizes.items()}


def hlo_text(compiled_or_text: Any) -> str:
    """HLO text of a `jax.stages.Compiled`, or the text itself."""
    return compiled_or_text if isinstance(compiled_or_text, str) else compiled_or_text.as_text()


def assert_collectives(
    compiled_or_text: Any,
    *,
    mesh: Any = None,
    scope: str | None = None,
    axis: str | None = None,
    pass_: str | None = None,
    all_to_all: int | None = None,
    all_gather: int | None = None,
    all_reduce: int | None = None,
    reduce_scatter: int | None = None,
    ragged_all_to_all: int | None = None,
    collective_permute: int | None = None,
) -> None:
    """Assert how many collectives of each kind a step executes.

    Args:
        compiled_or_text: `jax.jit(f).lower(...).compile()`, or its HLO text.
        mesh: the jax mesh, or {axis: size} in device order; needed for `axis`.
        scope: count only those of this stage, e.g. "dispatch".
        axis: count only those that run along this mesh axis.
        pass_: count only those of this pass, e.g. "backward".
        all_to_all: executions per step, loops multiplied; None leaves the kind unchecked. So for
            the other kinds.
        all_gather: see `all_to_all`.
        all_reduce: see `all_to_all`.
        reduce_scatter: see `all_to_all`.
        ragged_all_to_all: see `all_to_all`.
        collective_permute: see `all_to_all`.

    Raises:
        AssertionError: with the collectives found and the source lines of the offending ones.
        UserError: when the text is no HLO, or the mesh is not of its size.
    """
    expected = {
        "all-to-all": all_to_all,
        "all-gather": all_gather,
        "all-reduce": all_reduce,
        "reduce-scatter": reduce_scatter,
        "ragged-all-to-all": ragged_all_to_all,
        "collective-permute": collective_permute,
    }
    if axis is not None and mesh is None:
        raise ValueError("assert_collectives(axis=...) needs mesh=... to know the axes")
    extraction = extract_collectives(hlo_text(compiled_or_text), mesh_sizes(mesh))
    found = [
        each
        for each in extraction.collectives
        if (scope is None or each.scope == scope)
        and (axis is None or axis in each.axes)
        and (pass_ is None or each.pass_ == pass_)
    ]
    problems = []
    for kind, count in expected.items():
        same = [each for each in found if each.kind == kind]
        total = sum(each.count for each in same)
        if count is not None and total != count:
            problems.append(f"expected {count} {kind}, found {total}")
            problems += [f"    {_place(each)}" for each in same]
    if problems:
        lines = [*problems, "all that was counted:", *(f"    {_line(each)}" for each in found)]
        raise AssertionError("\n".join([*lines, *extraction.warnings]))


def _line(each: Collective) -> str:
    axes = ",".join(each.axes) or f"groups of {each.group_size}"
    return f"{each.kind} x{each.count} over {axes}, {each.scope} {each.pass_}, {each.bytes} B"


def _place(each: Collective) -> str:
    return f"{_line(each)} at {each.source or 'unknown source'} ({each.op_name or 'no op_name'})"
