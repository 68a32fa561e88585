"""Assert in anyone's test which collectives a program runs."""

from __future__ import annotations

from moe_shard.errors import UserError
from moe_shard.lowering.collectives import Collective, Extraction, extract_collectives
from moe_shard.lowering.inputs import MeshLike, ProgramLike, read_program
from moe_shard.lowering.mesh_axes import UNKNOWN_AXES
from moe_shard.scopes import SCOPES

_PASSES = ("forward", "backward", "optimizer", "unknown")


def assert_collectives(
    program: ProgramLike,
    *,
    mesh: MeshLike | None = None,
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
        program: `jax.jit(f).lower(...).compile()`, its HLO text or a path, see `report`.
        mesh: a jax mesh, or {axis: size} in device order; needed for `axis` where the program does
            not name its mesh.
        scope: count only those of this stage, such as "dispatch".
        axis: count only those that run along this mesh axis, alone or with others.
        pass_: count only those of this pass, such as "backward".
        all_to_all: executions per step, with loops multiplied in; None leaves the kind unchecked.
        all_gather: see `all_to_all`.
        all_reduce: see `all_to_all`.
        reduce_scatter: see `all_to_all`.
        ragged_all_to_all: see `all_to_all`.
        collective_permute: see `all_to_all`.

    Raises:
        AssertionError: with the collectives found and the source lines of the offending ones. A
            collective whose axes cannot be read from its groups fails an assertion along `axis`.
        UserError: the program cannot be read, the mesh is not of its size, or the arguments name
            an axis, a stage or a pass that does not exist, or no kind of collective.

    Example:
        >>> assert_collectives(compiled, axis="expert", all_to_all=2, all_gather=0)
        >>> assert_collectives(gathered, axis="expert", all_gather=0)
        Traceback (most recent call last):
        AssertionError: expected 0 all-gather, found 1
            all-gather x1 over expert, experts ..., 131072 B at ...
        ...
    """
    __tracebackhide__ = True  # pytest shows the caller's line and the message, not this function
    expected = {
        "all-to-all": all_to_all,
        "all-gather": all_gather,
        "all-reduce": all_reduce,
        "reduce-scatter": reduce_scatter,
        "ragged-all-to-all": ragged_all_to_all,
        "collective-permute": collective_permute,
    }
    if all(count is None for count in expected.values()):
        raise UserError(
            "assert_collectives asserts nothing: no kind of collective is given\n"
            "fix: add all_to_all=4, all_gather=0 or the like"
        )
    _check_names(scope, pass_)
    read = read_program(program, mesh=mesh)
    extraction = extract_collectives(read.text, read.mesh, before=read.before)
    if axis is not None:
        _check_axis(axis, extraction)
    found = [
        each
        for each in extraction.collectives
        if (scope is None or each.scope == scope)
        and (axis is None or axis in each.axes or each.axes == UNKNOWN_AXES)
        and (pass_ is None or each.pass_ == pass_)
    ]
    problems = []
    for kind, count in expected.items():
        same = [each for each in found if each.kind == kind]
        total = sum(each.count for each in same)
        if count is not None and axis is not None and any(axis not in each.axes for each in same):
            problems.append(f"expected {count} {kind} over {axis}, found some over unknown axes")
        elif count is not None and total != count:
            problems.append(f"expected {count} {kind}, found {total}")
        else:
            continue
        problems += [f"    {_place(each)}" for each in same]
    if problems:
        asked = [f"over {axis}"] * (axis is not None) + [scope] * (scope is not None)
        of = " ".join(["all collectives", *map(str, asked), *[pass_ or ""]]).strip()
        listed = [f"    {_line(each)}" for each in found] or ["    none"]
        raise AssertionError("\n".join([*problems, f"{of}:", *listed, *extraction.warnings]))


def _check_names(scope: str | None, pass_: str | None) -> None:
    """Refuse a misspelt stage or pass, of which every program has 0 collectives."""
    __tracebackhide__ = True
    for what, given, known in (
        ("stage", scope, (*SCOPES, "other")),
        ("pass", pass_, _PASSES),
    ):
        if given is not None and given not in known:
            raise UserError(f"there is no {what} {given!r}\nfix: one of {', '.join(known)}")


def _check_axis(axis: str, extraction: Extraction) -> None:
    __tracebackhide__ = True
    mesh = extraction.mesh
    if axis in mesh.sizes:
        return
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.sizes.items())
    if mesh.origin == "unnamed":
        raise UserError(
            f"axis={axis!r}: the program does not name its mesh, only its sizes: {sizes}\n"
            "fix: pass mesh=, the jax mesh or {axis: size} in device order"
        )
    raise UserError(f"axis={axis!r}: the program's mesh has no such axis\nfix: one of {sizes}")


def _line(each: Collective) -> str:
    axes = ",".join(each.axes) or f"groups of {each.group_size}"
    return f"{each.kind} x{each.count} over {axes}, {each.scope} {each.pass_}, {each.bytes} B"


def _place(each: Collective) -> str:
    return f"{_line(each)} at {each.source or 'unknown source'} ({each.op_name or 'no op_name'})"
