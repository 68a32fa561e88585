"""Compile the training step and read what it lowers to, for devices present or absent."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

import jax

from moe_shard.config import Config, check_against_mesh
from moe_shard.config.hardware import Hardware
from moe_shard.errors import Finding
from moe_shard.layers.attention_record import AttentionRecord, attention_records
from moe_shard.layers.embedding import loss_of
from moe_shard.lowering.hlo import parse_module
from moe_shard.lowering.memory import memory_from_compiled
from moe_shard.lowering.remat_warnings import MARK, with_source
from moe_shard.lowering.reports import LoweringReport, report_from_text
from moe_shard.lowering.timeline import Rates, Timeline, timeline
from moe_shard.moe.capacity import copies_per_sequence
from moe_shard.moe.record import MoERecord
from moe_shard.moe.strategy import moe_record
from moe_shard.program.step import Program
from moe_shard.runtime.bounds import MoEBounds, gradient_shares, moe_bounds
from moe_shard.runtime.compile_cache import (
    Counted,
    count_cached,
    keep_warnings,
    kept_warnings,
    program_key,
    without_cache,
)
from moe_shard.sharding.annotate import RuleConflicts, Sharding
from moe_shard.sharding.mesh import mesh_from_config
from moe_shard.sharding.rules import RuleTable
from moe_shard.stderr import collect_lines
from moe_shard.units import human_count, human_ranges

_OVERLAP = {
    "tpu": ("xla_tpu_enable_async_all_to_all", "xla_tpu_enable_async_ragged_all_to_all"),
    "cuda": ("xla_gpu_enable_latency_hiding_scheduler",),
    "rocm": ("xla_gpu_enable_latency_hiding_scheduler",),
}
_LESS_MEMORY = (
    "a smaller per_device_batch_size with more gradient_accumulation_steps, or remat_policy=full"
)
_NO_OPTIONS: Mapping[str, bool] = MappingProxyType({})


@dataclass(frozen=True)
class CompiledStep:
    """Hold the compiled training step.

    Attributes:
        executable: the executable.
        hlo: its text, after optimization.
        options: options given to the compiler in addition to its defaults, see `compiler_options`.
        partitioner_log: warnings of the partitioner while compiling.
        seconds: time to trace and compile, in seconds.
        cached: what the compilation cache did.
        warnings_unknown: whether the partitioner's warnings were not kept with a cached program.
    """

    executable: jax.stages.Compiled
    hlo: str
    options: Mapping[str, bool]
    partitioner_log: tuple[str, ...]
    seconds: float
    cached: Counted = field(default_factory=Counted)
    warnings_unknown: bool = False


def lay_out(
    config: Config, devices: Sequence[jax.Device] | None = None
) -> tuple[Sharding, tuple[str, ...]]:
    """Put a configuration's mesh and rules on devices.

    Args:
        config: the run.
        devices: present or absent devices; by default all of the default backend's.

    Returns:
        The mesh with its rules, and notes of one line each about settings that change nothing.

    Raises:
        UserError: the configuration does not fit the devices.
    """
    mesh = mesh_from_config(config.mesh, devices)
    notes = (*config.warnings, *check_against_mesh(config, dict(mesh.shape)))
    # Warnings are in the report, one line for all arrays that share a cause.
    conflicts: RuleConflicts = "error" if config.mesh.rule_conflicts == "error" else "record"
    return Sharding(mesh, RuleTable(config.mesh.logical_axis_rules), conflicts), notes


def compiler_options(config: Config, platform: str) -> dict[str, bool]:
    """Return the compiler's options for layers that exchange tokens in chunks.

    Chunks serve to overlap the exchange of one with the products of another. By default TPU's
    compiler waits for every all-to-all, and GPU's schedules ragged ones as if they took no time.

    Args:
        config: the run.
        platform: platform of the devices, see `Sharding.platform`.
    """
    moe = config.model.moe
    if moe is None or moe.num_moe_token_chunks == 1:
        return {}
    return dict.fromkeys(_OVERLAP.get(platform, ()), True)


def compile_step(program: Program, options: Mapping[str, bool] = _NO_OPTIONS) -> CompiledStep:
    """Compile the step for the devices of the program's mesh; nothing is allocated.

    The partitioner's warnings are kept from standard error: they are in the report. Of a program
    that the compilation cache has, they are those of the process that compiled it.

    Args:
        program: the result of `make_program`.
        options: the result of `compiler_options`.

    Raises:
        Finding: the compiler reports that the step does not fit in memory.
    """
    started = time.perf_counter()
    with out_of_memory_is_a_finding(), collect_lines(MARK) as log:
        lowered = program.step.lower(program.abstract_state, program.abstract_batch)
        with count_cached() as cached:
            executable = lowered.compile(compiler_options=dict(options))
        hlo = _text(executable)
        if hlo is None and cached.found:
            # A backend may load a program without its text, which the report is read from.
            with without_cache(), count_cached() as cached:
                jax.clear_caches()  # of this process, which has it as it was loaded
                lowered = program.step.lower(program.abstract_state, program.abstract_batch)
                executable = lowered.compile(compiler_options=dict(options))
            hlo = _text(executable)
    assert hlo is not None, "every backend of jax prints the HLO that it has compiled"
    found: list[str] | None = log
    if cached.found:
        found = kept_warnings(program_key(lowered, options))
    elif cached.kept:
        module = parse_module(hlo) if log else None
        lines = [with_source(line, module) for line in log] if module else []
        keep_warnings(program_key(lowered, options), lines)
    return CompiledStep(
        executable,
        hlo,
        options,
        partitioner_log=tuple(found or ()),
        seconds=time.perf_counter() - started,
        cached=cached,
        warnings_unknown=found is None,
    )


def _text(executable: jax.stages.Compiled) -> str | None:
    """Return the optimized HLO; None where the backend has none of it."""
    try:
        return executable.as_text()
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return None


def report_step(step: CompiledStep, sharding: Sharding, backend: str) -> LoweringReport:
    """Report the collectives of the compiled step.

    Args:
        step: the result of `compile_step`.
        sharding: the mesh and its rules, from which the expert axes follow.
        backend: "cpu", "tpu" or "gpu".
    """
    return report_from_text(
        step.hlo,
        mesh=dict(sharding.mesh.shape),
        expert_axes=sharding.table.expert_axes,
        memory=memory_from_compiled(step.executable),
        backend=backend,
        partitioner_log=step.partitioner_log,
    )


def option_lines(step: CompiledStep) -> list[str]:
    """Write the compiler's options in addition to its defaults: one line, or none."""
    options = ", ".join(f"{name}={str(value).lower()}" for name, value in step.options.items())
    return [f"compiler options, for num_moe_token_chunks: {options}"] if options else []


def bounds_of_step(config: Config, program: Program) -> MoEBounds | None:
    """Compute the least work of the MoE layers in a training step; None for a dense model."""
    if config.model.moe is None:
        return None
    return moe_bounds(
        config,
        program.model.sharding.table,
        copies_per_sequence=copies_per_sequence(
            config.model.moe, tokens=config.train.max_target_length
        ),
        gradients=gradient_shares(config.model, program),
    )


def bound_lines(config: Config, program: Program, report: LoweringReport) -> list[str]:
    """Write the least work of the MoE layers and what the program sends, for people.

    A dense model has no such lines.
    """
    bounds = bounds_of_step(config, program)
    if bounds is None:
        return []
    assert report.extraction is not None, "the step was compiled"
    return bounds.lines(report.extraction, program.model.sharding.table.expert_axes)


def moe_records(config: Config, sharding: Sharding) -> dict[str, MoERecord]:
    """Return {layers: their record} for the MoE layers of the training step.

    It follows from configuration, mesh and shapes; the layers run what the same function decides.
    """
    if config.model.moe is None:
        return {}
    sequences = config.train.microbatch_rows(sharding.mesh.size)
    tokens = (sequences, config.train.max_target_length, config.model.emb_dim)
    record = moe_record(config.model.moe, sharding, tokens, config.model.dtype)
    if not config.model.gating.has_gate:
        record = record.apart("the experts have no gate")
    elif any(config.model.lora.adapts(f"mlp/experts/{part}") for part in ("gate", "down")):
        record = record.apart("adapters have products between")
    layers = [layer for layer, kind in enumerate(config.model.all_layer_kinds) if kind.moe]
    name = f"layer{'s' if len(layers) > 1 else ''} {human_ranges(layers)}"
    return {name: record}


def attention_of_step(config: Config, sharding: Sharding) -> dict[str, AttentionRecord]:
    """Return {layers: their record} for the attention of the training step."""
    sequences = config.train.microbatch_rows(sharding.mesh.size)
    tokens = (sequences, config.train.max_target_length)
    return attention_records(config.model, sharding, tokens)


def loss_lines(config: Config, sharding: Sharding) -> list[str]:
    """Write how the training step computes its loss, for people."""
    tokens = (config.train.microbatch_rows(sharding.mesh.size), config.train.max_target_length)
    train = config.train
    loss = loss_of(config.model, sharding, tokens, train.cross_entropy, train.num_vocab_tiling)
    return [loss.line(), *_mtp_lines(config)]


def _mtp_lines(config: Config) -> list[str]:
    """Write what MTP layers there are, and what their loss counts for, for people."""
    mtp, last = config.model.mtp, config.model.num_decoder_layers
    layers = range(last, last + mtp.mtp_num_layers)
    if not layers:
        return []
    what = f"{human_count(len(layers), 'layer')} after the last ({human_ranges(layers)})"
    return [
        f"multi-token prediction: {what}, of tokens up to {len(layers) + 1} ahead in their "
        f"document; their mean loss counts {mtp.mtp_loss_scaling_factor:g} times"
    ]


def estimate_step(
    config: Config, hardware: Hardware | None, report: LoweringReport
) -> Timeline | None:
    """Estimate the time that a step cannot beat; None where the accelerator's peaks are unknown."""
    if hardware is None or report.extraction is None:
        return None
    rates = rates_of(hardware, config.model.dtype)
    return None if rates is None else timeline(report.extraction, rates)


def rates_of(hardware: Hardware, dtype: str) -> Rates | None:
    """Return an accelerator's peak rates per second; None where they are not known.

    Args:
        hardware: one device.
        dtype: dtype of the products; bfloat16's peak is used for one that is not listed.
    """
    peak = hardware.peak_flops.get(dtype) or hardware.peak_flops.get("bfloat16")
    if peak is None or hardware.hbm_bandwidth is None or hardware.link_bandwidth is None:
        return None
    return Rates(peak, hardware.hbm_bandwidth, hardware.link_bandwidth, hardware.network_bandwidth)


def estimate_lines(config: Config, found: Timeline | None, num_devices: int) -> list[str]:
    """Write the estimate for people, or one line on why there is none."""
    if found is None:
        return ["no estimate of time: the peaks of this hardware are not known"]
    rows = config.train.global_batch_rows(num_devices)
    return found.lines(rows * config.train.max_target_length // num_devices)


@contextmanager
def out_of_memory_is_a_finding(fix: str = _LESS_MEMORY) -> Iterator[None]:
    """Raise a `Finding` where a compiler or device runs out of memory in the block.

    Args:
        fix: the suggested fix.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise Finding(f"out of memory: {str(error).splitlines()[0][:200]}\nfix: {fix}") from error
