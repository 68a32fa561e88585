"""What a program should do, said as a verdict or as an assertion in anyone's test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_shard.lowering.collectives import Collective, extract_collectives
from moe_shard.lowering.mesh_axes import UNKNOWN_AXES
from moe_shard.lowering.op_names import MOE_SCOPES
from moe_shard.lowering.walk import EXCHANGES

VERDICTS = ("expert-parallel", "weight-gathered", "mixed", "no-expert-parallelism")

# The router's own exchanges (its gradient, top-k scores) are no sign of gathered weights.
_WEIGHT_SCOPES = frozenset(MOE_SCOPES) - {"router"}
# Scalars, token counts and offsets: up to 256 experts of 4 bytes.
_SMALL_BYTES = 1024
# Indices and scores beside the tokens of dispatch and combine. In `experts` there are none.
_SMALL_FRACTION = 16


def verdict(collectives: Iterable[Collective], expert_axes: Sequence[str]) -> str:
    """Say whether the experts are expert-parallel or silently FSDP.

    Args:
        collectives: those of the whole step, with axes.
        expert_axes: the mesh axes of size above 1 that the experts are sharded along.

    Returns:
        One of `VERDICTS`. A gather along axes that could not be told ("?") counts as one along the
        expert axis: the verdict must not flatter.
    """
    wanted = set(expert_axes)
    if not wanted:
        return "no-expert-parallelism"
    inside = [
        each
        for each in collectives
        if each.scope in _WEIGHT_SCOPES and (wanted & set(each.axes) or each.axes == UNKNOWN_AXES)
    ]
    largest = max((each.bytes for each in inside), default=0)
    gathered = any(
        each.kind not in EXCHANGES
        and each.bytes > _SMALL_BYTES
        and (each.scope == "experts" or each.bytes * _SMALL_FRACTION > largest)
        for each in inside
    )
    exchanged = any(each.kind in EXCHANGES and each.axes != UNKNOWN_AXES for each in inside)
    if gathered:
        return "mixed" if exchanged else "weight-gathered"
    return "expert-parallel" if exchanged else "no-expert-parallelism"


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
