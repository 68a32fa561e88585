"""Report, judge and compare compiled programs: `moe_shard.lowering.{report, verdict, diff}`.

Each function takes a program in any form (`inputs.ProgramLike`); the examples continue that of
`moe_shard.lowering`, which compiles a small MoE layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moe_shard.lowering.differences import (
    Diff,
    Lowering,
    compare,
    from_object,
    load,
    with_shared_mesh,
)
from moe_shard.lowering.inputs import MeshLike, ProgramLike, mesh_sizes, path_of, read_program
from moe_shard.lowering.reports import LoweringReport, report_from_text


def report(
    program: ProgramLike,
    *,
    mesh: MeshLike | None = None,
    expert_axes: Sequence[str] | None = None,
    before: str | None = None,
    stages: Mapping[str, str] | None = None,
    count_further_rounds: bool = False,
) -> LoweringReport:
    """Report which collectives a compiled program runs, along which mesh axes, and its verdict.

    Args:
        program: `jax.jit(f).lower(...).compile()`, its HLO text, or the path of an HLO file, of a
            folder written by `XLA_FLAGS=--xla_dump_to`, or of a run's folder. A lowered program is
            compiled first.
        mesh: a jax mesh, or {axis: size} in device order. It is needed only where the program does
            not name its mesh: an executable whose inputs have NamedShardings does, and so does the
            text of jax 0.11 and newer. Without names the axes are called axis_0, axis_1, ...
        expert_axes: the mesh axes of the experts. By default the axis called "expert", or, where
            there is none, the axes over which the experts' weights are split.
        before: the text of the module before optimization, which names the mesh in every version
            of jax, such as `lowered.as_text("hlo")`.
        stages: {a word in a named scope: the stage it stands for}, such as {"wi_0": "experts"}, in
            addition to the words that are known.
        count_further_rounds: count once the exchanges of ragged dispatch that run only where a
            router exceeds what one exchange holds.

    Returns:
        The report. `print` shows it as a table, `to_json()` returns it as one object.

    Raises:
        UserError: the program cannot be read, its text is not one whole HLO module, or the mesh is
            not of its size.

    Example:
        >>> print(report(compiled))
              collectives per step, 8 devices (cpu): data 2, expert 4
        <BLANKLINE>
          collective   axis     stage      pass      count   bytes each     bytes
         ─────────────────────────────────────────────────────────────────────────
          all-to-all   expert   dispatch   forward       1      32.8 kB   32.8 kB
          all-to-all   expert   combine    forward       1      32.8 kB   32.8 kB
        <BLANKLINE>
          total                                          2                65.5 kB
        <BLANKLINE>
        verdict: expert-parallel (as compiled for cpu)
        memory per device: ...
    """
    read = read_program(program, mesh=mesh, before=before)
    return report_from_text(
        read.text,
        mesh=read.mesh,
        expert_axes=expert_axes,
        before=read.before,
        stages=stages,
        memory=read.memory,
        count_further_rounds=count_further_rounds,
    )


def verdict(
    program: ProgramLike,
    *,
    mesh: MeshLike | None = None,
    expert_axes: Sequence[str] | None = None,
    before: str | None = None,
) -> str:
    """Judge whether a compiled program's experts are expert-parallel, in one word.

    Args:
        program: see `report`.
        mesh: see `report`.
        expert_axes: see `report`.
        before: see `report`.

    Returns:
        One of `verdict_names.VERDICTS`: "expert-parallel" (tokens move by AllToAll over the expert
        axis), "weight-gathered" (expert weights are gathered over it), "mixed",
        "no-expert-parallelism", or "unknown".

    Raises:
        UserError: see `report`.

    Example:
        >>> verdict(compiled)
        'expert-parallel'
        >>> verdict(compiled.as_text(), mesh={"data": 2, "expert": 4})
        'expert-parallel'
    """
    found = report(program, mesh=mesh, expert_axes=expert_axes, before=before).verdict
    assert found is not None, "a compiled program has a verdict"
    return found


def diff(
    a: ProgramLike | LoweringReport,
    b: ProgramLike | LoweringReport,
    *,
    mesh: MeshLike | None = None,
) -> Diff:
    """Compare what two programs lower to, by stage, pass, kind of collective and mesh axis.

    Args:
        a: the program before, in any form that `report` takes, or a report of it; a path may also
            be that of a `lowering.json`.
        b: the program after.
        mesh: see `report`; for the sides that do not name theirs. A mesh that only one side names
            is used for both if they run on as many devices.

    Returns:
        The difference. `print` shows it in words, `.same` is True where nothing that counts
        differs, `to_json()` returns it as one object.

    Raises:
        UserError: see `report`.

    Example:
        >>> print(diff(compiled, compiled))
        A: a
        B: b
        the same: collectives, verdict and memory
        >>> diff(compiled, gathered).same
        False
    """
    sizes = mesh_sizes(mesh)
    return compare(
        *with_shared_mesh(
            lambda known: _lowering(a, "a", known or sizes),
            lambda known: _lowering(b, "b", known or sizes),
        )
    )


def _lowering(
    program: ProgramLike | LoweringReport, name: str, mesh: Mapping[str, int] | None
) -> Lowering:
    if isinstance(program, LoweringReport):
        return from_object(program.to_json(), name)
    if (path := path_of(program)) is not None:
        return load(path, mesh)
    return from_object(report(program, mesh=mesh).to_json(), name)
