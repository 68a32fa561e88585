"""Compiling the training step and reading what it lowers to, for devices present or absent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import jax

from moe_shard.config import Config, check_against_mesh
from moe_shard.errors import Finding
from moe_shard.lowering.remat_warnings import remat_lines
from moe_shard.lowering.report import LoweringReport, memory_from_compiled, report_from_text
from moe_shard.sharding.annotate import Annotator
from moe_shard.sharding.mesh import make_mesh
from moe_shard.training.step import Program

# What the partitioner said of a step while it was compiled; a Compiled itself does not keep it.
_partitioner_logs: WeakKeyDictionary[jax.stages.Compiled, list[str]] = WeakKeyDictionary()


def lay_out(
    config: Config, devices: Sequence[jax.Device] | None = None
) -> tuple[Annotator, tuple[str, ...]]:
    """Put a configuration's mesh and rules on devices.

    Args:
        config: the run.
        devices: present or absent; all of the default backend's by default.

    Returns:
        The mesh with its rules, and notes of one line each about settings that change nothing.

    Raises:
        UserError: the configuration does not fit the devices.
    """
    mesh = make_mesh(config.mesh, devices)
    notes = (*config.warnings, *check_against_mesh(config, dict(mesh.shape)))
    return Annotator(mesh, config.mesh.rules, config.mesh.rule_conflicts), notes


def compile_step(program: Program) -> jax.stages.Compiled:
    """Compile the step for the devices of the program's mesh; nothing is allocated.

    The partitioner's warnings do not reach standard error: they are in the report.

    Raises:
        Finding: the compiler says that the step does not fit in memory.
    """
    with out_of_memory_is_a_finding(), remat_lines() as lines:
        compiled = program.step.lower(program.abstract_state, program.abstract_batch).compile()
    _partitioner_logs[compiled] = lines
    return compiled


def report_step(compiled: jax.stages.Compiled, annotate: Annotator, backend: str) -> LoweringReport:
    """What the compiled step does between devices.

    Args:
        compiled: of `compile_step`.
        annotate: the mesh and its rules, from which the expert axes follow.
        backend: "cpu", "tpu" or "gpu".
    """
    return report_from_text(
        hlo_text(compiled),
        mesh=dict(annotate.mesh.shape),
        expert_axes=annotate.table.sharding_axes("exp"),
        memory=memory_from_compiled(compiled),
        backend=backend,
        partitioner_log=_partitioner_logs.get(compiled, ()),
    )


def hlo_text(compiled: jax.stages.Compiled) -> str:
    """The optimized HLO."""
    text = compiled.as_text()
    assert text is not None, "every backend of jax prints its HLO"
    return text


@contextmanager
def out_of_memory_is_a_finding() -> Iterator[None]:
    """Within the block, a compiler or device that runs out of memory raises a `Finding`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise Finding(
            f"out of memory: {str(error).splitlines()[0][:200]}\n"
            "fix: a smaller per_device_batch_size with more gradient_accumulation_steps, or "
            "remat_policy=full"
        ) from error
