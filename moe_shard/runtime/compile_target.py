"""Compile the training step for absent hardware, and check that it fits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from moe_shard.config import Config
from moe_shard.errors import Finding
from moe_shard.layers.attention_record import AttentionRecord
from moe_shard.lowering.reports import LoweringReport
from moe_shard.lowering.timeline import Timeline
from moe_shard.moe.record import MoERecord
from moe_shard.program.step import make_program
from moe_shard.runtime.compile import (
    attention_of_step,
    bound_lines,
    compile_step,
    compiler_options,
    estimate_lines,
    estimate_step,
    lay_out,
    loss_lines,
    moe_records,
    option_lines,
    report_step,
)
from moe_shard.runtime.jax_settings import refuse_settings_of_jax
from moe_shard.runtime.targets.target import Target, compiled_with, devices_for
from moe_shard.sharding.annotate import Sharding
from moe_shard.units import human_bytes

# The fraction of a GPU's memory that jax uses unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
_GPU_FRACTION = 0.75


@dataclass(frozen=True)
class TargetReport:
    """Describe what the step of a configuration does on a target.

    Attributes:
        target: the hardware.
        lowering: its collectives and memory; empty where the compiler refused.
        compiled_with: the compiler, and that nothing ran.
        compile_time_s: time to trace and compile, in seconds.
        num_params: parameters of the model.
        hlo: the optimized HLO; None where the compiler refused.
        refusal: the compiler's out-of-memory message, or None.
        notes: settings without effect, and what the target's devices leave out; one line each.
        conflicts: rule conflicts, one line each.
        moe: records of the MoE layers, by layers.
        attention: records of attention, by layers.
        loss: how the loss is computed, one line each.
        bounds: the least work of the MoE layers, one line each.
        estimate: estimate of the step's time; None where the peaks of the target are not known.
        estimate_lines: the estimate as lines for people.
    """

    target: Target
    lowering: LoweringReport
    compiled_with: str
    compile_time_s: float
    num_params: int
    hlo: str | None
    refusal: str | None
    notes: tuple[str, ...]
    conflicts: tuple[str, ...]
    moe: Mapping[str, MoERecord] = field(default_factory=dict)
    attention: Mapping[str, AttentionRecord] = field(default_factory=dict)
    loss: tuple[str, ...] = ()
    bounds: tuple[str, ...] = ()
    estimate: Timeline | None = None
    estimate_lines: tuple[str, ...] = ()

    @property
    def needed_bytes(self) -> int | None:
        """Return the memory that a device must have; None where it is not known.

        A GPU's temporaries are one allocation, whether all are live or not. On TPU the compiler
        checks the peak: it accepts steps whose temporaries add up to more than the memory.
        """
        memory = self.lowering.memory
        if memory is None:
            return None
        peak = memory.get("peak_bytes") if self.target.backend == "tpu" else None
        return peak or memory["total_bytes"]

    @property
    def fits(self) -> bool | None:
        """Return whether the step fits in a device's memory; None where that is not known."""
        if self.refusal is not None:
            return False
        needed, available = self.needed_bytes, self.target.hardware.hbm_bytes
        return None if needed is None or available is None else needed <= available

    def memory_line(self) -> str:
        """Write what the step needs, what a device has, and whether it fits, on one line."""
        hardware, needed = self.target.hardware, self.needed_bytes
        if needed is None:
            return "memory per device: unknown"
        used = f"memory per device: {human_bytes(needed)}"
        if hardware.hbm_bytes is None:
            return f"{used} ({hardware.name}: no memory of its own to fit in)"
        line = f"{used} of {human_bytes(hardware.hbm_bytes)} ({hardware.name})"
        if not self.fits:
            return f"{line}: does not fit"
        share = needed / hardware.hbm_bytes
        if self.target.backend == "gpu" and share > _GPU_FRACTION:
            return f"{line}: fits, with XLA_PYTHON_CLIENT_MEM_FRACTION={min(share + 0.05, 1):.2f}"
        return f"{line}: fits"

    def to_json(self) -> dict[str, Any]:
        """Return the object of `lowering.json`, with what is known of the target."""
        return {
            **self.lowering.to_json(),
            "moe": {layers: record.to_json() for layers, record in self.moe.items()},
            "attention": {name: record.to_json() for name, record in self.attention.items()},
            "target": self.target.text,
            "hardware": self.target.hardware.name,
            "compile_time_s": round(self.compile_time_s, 2),
            "fits": self.fits,
            "compiled_with": self.compiled_with,
            "rematerializations": self.lowering.rematerializations,
            "estimate": self.estimate.to_json() if self.estimate else None,
        }


def compile_for_target(config: Config, target: Target) -> TargetReport:
    """Compile the step that `train.py` runs for a target; nothing is allocated or run.

    Args:
        config: the run.
        target: the result of `parse_target`.

    Raises:
        UserError: the target's compiler is not installed, the configuration does not fit the
            target's devices, or jax has settings that this package does not support.
    """
    refuse_settings_of_jax()
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program has no compile time
    sharding, notes = lay_out(config, devices_for(target))
    program = make_program(config, sharding)
    started = time.perf_counter()
    step = refusal = None
    try:
        step = compile_step(program, compiler_options(config, sharding.platform))
    except Finding as finding:
        refusal = str(finding)
    spent = time.perf_counter() - started
    lowering = report_step(step, sharding, target.backend) if step else _nothing(sharding, target)
    found = estimate_step(config, target.hardware, lowering)
    return TargetReport(
        target=target,
        lowering=lowering,
        bounds=(*option_lines(step), *bound_lines(config, program, lowering)) if step else (),
        loss=tuple(loss_lines(config, sharding)),
        estimate=found,
        estimate_lines=tuple(estimate_lines(config, found, sharding.mesh.size)) if step else (),
        compiled_with=compiled_with(target),
        compile_time_s=spent,
        num_params=program.model.num_params,
        hlo=step.hlo if step else None,
        refusal=refusal,
        notes=(*notes, *program.notes, *([target.note] if target.note else [])),
        conflicts=tuple(sharding.conflict_lines()),
        moe=moe_records(config, sharding),
        attention=attention_of_step(config, sharding),
    )


def _nothing(sharding: Sharding, target: Target) -> LoweringReport:
    """Return the report of a step that was not compiled."""
    return LoweringReport(
        backend=target.backend,
        num_devices=sharding.mesh.size,
        mesh=dict(sharding.mesh.shape),
        verdict=None,
        collectives=(),
        totals={},
        memory=None,
        warnings=(),
    )
