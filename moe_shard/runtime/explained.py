"""Explain the placement of the step that is trained, without compiling or running it.

The step is traced on an abstract mesh, which needs no device, real or simulated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, AxisType

from moe_shard.checkpoints.resolve import load_model
from moe_shard.config import Config, check_against_mesh
from moe_shard.config.foreign import ASSUMED_SIZE, read_foreign_table, take_sizes
from moe_shard.config.load import maxtext_keys
from moe_shard.config.tables import is_maxtext_table
from moe_shard.program.step import Program, make_program
from moe_shard.runtime.jax_settings import refuse_settings_of_jax
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.explain.explanation import (
    Explanation,
    Recorder,
    Rules,
    explain,
    usable_rules,
)
from moe_shard.sharding.rules import RuleTable

_FLAG = "moe_dispatch_no_expert_sharding"


def explain_config(config: Config) -> Explanation:
    """Explain a configuration on `num_simulated_devices` devices.

    Raises:
        UserError: the sizes do not multiply to the devices, or do not divide a dim.
    """
    # As with simulated devices, no hardware limits the number of slices.
    slices = math.prod(size for size in config.mesh.dcn if size != -1)
    sizes = config.mesh.resolve(config.mesh.num_simulated_devices, slices)
    notes = (*config.warnings, *check_against_mesh(config, sizes))
    # Conflicts are to be reported here, so they never end the trace.
    rules = RuleTable(config.mesh.logical_axis_rules)
    sharding = Sharding(_abstract_mesh(sizes), rules, rule_conflicts="record")
    program = _trace(config, sharding)
    return explain(
        model=config.run.model_name,
        table="logical_axis_rules",
        rules=config.mesh.logical_axis_rules,
        mesh_axes=config.mesh.mesh_axes,
        sizes=sizes,
        arrays=sharding.arrays.values(),
        parameters=_parameter_names(program),
        notes=notes,
        state_bytes=_state_bytes(program),
    )


def explain_table(model: str, overrides: Sequence[str], path: Path) -> Explanation:
    """Explain how a rule file would place a model, on the file's own mesh.

    Conflicts that occur only under the other setting of the flag are reported too.

    Args:
        model: a name in `configs/models/` or the path of a YAML file.
        overrides: `key=value` arguments; parallelism refers to the file's axes, each of size 2 by
            default.
        path: the rule file.

    Raises:
        UserError: the file cannot be read, or an override is invalid.
    """
    table = read_foreign_table(path)
    sizes, assumed, others = take_sizes(overrides, table.mesh_axes)
    config = load_model(model, others)
    notes = list(config.warnings)
    if config.not_built:
        notes.append(f"arrays of what is not built are missing: {', '.join(config.not_built)}")
    if assumed:
        notes.append(f"sizes assumed to be {ASSUMED_SIZE}: {', '.join(assumed)}")
    if not table.names_its_axes:
        notes.append(f"{path.name} has no mesh_axes: the mesh has the axes that its rules name")
    asked = _explain_rules(config, path.name, table.rules, sizes, notes)
    moe = config.model.moe
    if moe is None:
        return asked
    flag = not moe.moe_dispatch_no_expert_sharding
    other = replace(
        config, model=replace(config.model, moe=replace(moe, moe_dispatch_no_expert_sharding=flag))
    )
    known = {(conflict.dim, conflict.rule, conflict.held_by) for conflict in asked.conflicts}
    more = [
        replace(conflict, only_if=f"{_FLAG}={str(flag).lower()}")
        for conflict in _explain_rules(other, path.name, table.rules, sizes, ()).conflicts
        if (conflict.dim, conflict.rule, conflict.held_by) not in known
    ]
    return replace(asked, conflicts=(*asked.conflicts, *more))


def _explain_rules(
    config: Config, name: str, rules: Rules, sizes: dict[str, int], notes: Sequence[str]
) -> Explanation:
    recorder = Recorder(_abstract_mesh(sizes), usable_rules(rules, tuple(sizes)))
    program = _trace(config, recorder)
    return explain(
        model=config.run.model_name,
        table=name,
        rules=rules,
        mesh_axes=tuple(sizes),
        sizes=sizes,
        arrays=recorder.arrays.values(),
        parameters=_parameter_names(program),
        sizes_are_assumed=True,
        notes=notes,
        is_maxtexts=is_maxtext_table(rules, tuple(sizes), maxtext_keys()),
    )


def _abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def _trace(config: Config, sharding: Sharding) -> Program:
    """Trace the step so that `sharding` records its arrays."""
    refuse_settings_of_jax()
    program = make_program(config, sharding)
    jax.eval_shape(program.step, program.abstract_state, program.abstract_batch)
    return program


def _parameter_names(program: Program) -> list[str]:
    return [spec.name for spec in jax.tree.leaves(program.model.specs)]


def _state_bytes(program: Program) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(program.abstract_state)
    )
