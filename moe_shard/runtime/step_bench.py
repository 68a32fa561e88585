"""Measure whole training steps: variants of this package, and other packages on the same work.

All are prepared first and then take turns (A B C, A B C, ...), so that a machine that slows down
slows all of them. Ratios are medians over rounds of times of one round. Bytes, FLOPs and memory are
read from the compiled programs and do not vary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from moe_shard.config import Config
from moe_shard.config.hardware import find_hardware
from moe_shard.config.strategies import strategy_names
from moe_shard.lowering.memory import memory_from_compiled
from moe_shard.lowering.reports import LoweringReport, report_from_text
from moe_shard.lowering.work import flops_by_scope
from moe_shard.models.flops import step_flops_per_token
from moe_shard.models.params import describe
from moe_shard.program.step import BATCH_FIELDS, Program, make_program
from moe_shard.runtime.bounds import moe_wire_bytes
from moe_shard.runtime.compile import (
    bounds_of_step,
    compile_step,
    compiler_options,
    lay_out,
    report_step,
)

OWN = "moe_shard"
"""The package of a row that is a variant of this one."""
_WARM_UP = 2
_FLAG = "moe_dispatch_no_expert_sharding"

StepBatch = dict[str, Int[np.ndarray, "B S"]]


@dataclass(frozen=True)
class StepFacts:
    """Hold what is read from a compiled step; None where it has no text, or no expert axis.

    Attributes:
        verdict: verdict on the lowering.
        wire_over_bound: bytes that its MoE layers send along the expert axis, over the least.
        flops_over_ideal: FLOPs of its products over those that its tokens need, see
            `models.flops`.
        temp_bytes: bytes of temporaries per device.
        compile_seconds: time to trace and compile.
        flops_per_token: operations that a token needs, see `models.flops`; None: as if all
            parameters were trained.
    """

    verdict: str | None = None
    wire_over_bound: float | None = None
    flops_over_ideal: float | None = None
    temp_bytes: int | None = None
    compile_seconds: float | None = None
    flops_per_token: int | None = None


@dataclass(frozen=True)
class Contender:
    """Describe a training step that is ready to run.

    Attributes:
        name: its name in tables.
        package: who makes it, with its version.
        step: make one update, wait for it, and return its loss.
        facts: what is read from the program.
        remark: how its work differs from the others'; "" where it does not.
    """

    name: str
    package: str
    step: Callable[[], float]
    facts: StepFacts
    remark: str = ""


@dataclass(frozen=True)
class StepMeasurement:
    """Hold one row of the table.

    Attributes:
        name: name of the contender.
        package: who makes it.
        tokens: S, tokens of a sequence.
        rows: sequences of a step, on all devices.
        ratio: median over rounds of its time over that of the first contender.
        ratio_to: {name of another package's contender: the same over its time}.
        seconds: median time of a step.
        least_seconds: the shortest.
        tokens_per_second: of one device.
        mfu: useful FLOPs per second over the device's peak; None where that is unknown.
        loss: the loss of the last update.
        verdict: see `StepFacts`, as the five below.
        wire_over_bound: bytes over the least.
        flops_over_ideal: FLOPs over the ideal.
        temp_bytes: temporaries of a device.
        compile_seconds: time to compile.
        flops_per_token: operations that a token needs.
        remark: how its work differs; "" where it does not.
    """

    name: str
    package: str
    tokens: int
    rows: int
    ratio: float
    ratio_to: dict[str, float]
    seconds: float
    least_seconds: float
    tokens_per_second: float
    mfu: float | None
    loss: float
    verdict: str | None
    wire_over_bound: float | None
    flops_over_ideal: float | None
    temp_bytes: int | None
    compile_seconds: float | None
    flops_per_token: int | None
    remark: str

    def to_json(self) -> dict[str, Any]:
        """Return an object of `moe-shard bench --step --json`."""
        return asdict(self)


def step_variants(config: Config) -> dict[str, list[str]]:
    """Return {name: overrides} of the ways in which this package makes the step.

    Args:
        config: the measured model; a dense one has one way.
    """
    if config.model.moe is None:
        return {"dense": []}
    found = {}
    for name in sorted(strategy_names(), key=lambda each: (each != "gather", each)):
        found[name] = [f"moe_dispatch={name}", f"{_FLAG}=true"]
    if config.as_flat_dict()["ici_expert_parallelism"] != 1:
        found["gather, flag off"] = ["moe_dispatch=gather", f"{_FLAG}=false"]
    return found


def host_batch(config: Config, devices: int) -> StepBatch:
    """Draw the batch that all contenders get: one document a sequence, random tokens."""
    rows, length = config.train.global_batch_rows(devices), config.train.max_target_length
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (rows, length + 1))
    tokens = tokens.astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    ones = np.ones((rows, length), np.int32)
    return dict(zip(BATCH_FIELDS, (tokens[:, :-1], tokens[:, 1:], positions, ones), strict=True))


def prepare_own(name: str, config: Config) -> Contender:
    """Compile the step of a configuration, and make its first state.

    Raises:
        UserError: the configuration does not fit the devices.
        Finding: the step does not fit in memory.
    """
    sharding, _ = lay_out(config)
    program = make_program(config, sharding)
    compiled = compile_step(program, compiler_options(config, sharding.platform))
    report = report_step(compiled, sharding, jax.default_backend())
    facts = program_facts(config, program, report, compiled.seconds)
    shape = program.abstract_batch["inputs"].shape
    batch = {
        field: jax.device_put(each.reshape(shape), program.batch_sharding)
        for field, each in host_batch(config, jax.device_count()).items()
    }
    states = [program.init(jax.random.key(config.train.seed))]

    def step() -> float:
        state, metrics = compiled.executable(states.pop(), batch)
        states.append(jax.block_until_ready(state))
        return float(metrics["loss"])

    return Contender(name, OWN, step, facts)


def facts_of_text(config: Config, compiled: jax.stages.Compiled, seconds: float) -> StepFacts:
    """Read another package's step, compiled by the jax of this process."""
    text = compiled.as_text()
    assert text is not None, "every backend of jax prints its HLO"
    sharding, _ = lay_out(config)
    report = report_from_text(text, memory=memory_from_compiled(compiled))
    return program_facts(config, make_program(config, sharding), report, seconds)


def program_facts(
    config: Config, program: Program, report: LoweringReport, seconds: float
) -> StepFacts:
    """Compare a program with the least work of a configuration.

    Args:
        config: model and batch.
        program: its step, from which the least follows.
        report: what was compiled.
        seconds: time to compile it.
    """
    assert report.extraction is not None, "the step was compiled"
    length, wire = config.train.max_target_length, None
    sharding = program.model.sharding
    bounds = bounds_of_step(config, program)
    if bounds is not None and bounds.wire_bytes:
        axes = sharding.table.expert_axes
        wire = moe_wire_bytes(report.collectives, axes) / bounds.wire_bytes
    done = flops_by_scope(report.extraction.walk, report.extraction.roles.flow).total()
    tokens = config.train.global_batch_rows(sharding.mesh.size) * length / sharding.mesh.size
    ideal = tokens * program.flops_per_token
    return StepFacts(
        verdict=report.verdict,
        wire_over_bound=wire,
        flops_over_ideal=done / ideal if done else None,
        temp_bytes=report.memory["temp_bytes"] if report.memory else None,
        compile_seconds=seconds,
        flops_per_token=program.flops_per_token,
    )


def measure_steps(
    config: Config,
    contenders: Sequence[Contender],
    *,
    rounds: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[StepMeasurement]:
    """Run the contenders in turns.

    Args:
        config: model and batch, the same for all.
        contenders: the first is what `ratio` is relative to.
        rounds: number of timed steps of each, after two that are not timed.
        progress: called with a description of the current step.
    """
    losses = {}
    for contender in contenders:
        progress(f"first steps of {contender.name}")
        for _ in range(_WARM_UP):
            contender.step()
    times: list[list[float]] = []
    for index in range(rounds):
        progress(f"round {index + 1} of {rounds}")
        row = []
        for contender in contenders:
            started = time.perf_counter()
            losses[contender.name] = contender.step()
            row.append(time.perf_counter() - started)
        times.append(row)
    peers = {each.name: at for at, each in enumerate(contenders) if each.package != OWN}
    rows, length = (
        config.train.global_batch_rows(jax.device_count()),
        config.train.max_target_length,
    )
    hardware = find_hardware(jax.devices()[0].device_kind)
    peak = hardware.peak_flops.get(config.model.dtype) if hardware else None
    specs = describe(config.model, lay_out(config)[0]).specs
    of_all = step_flops_per_token(config.model, specs, specs, seq_len=length)

    def ratio(of: int, to: int) -> float:
        return statistics.median(row[of] / row[to] for row in times)

    found = []
    for at, contender in enumerate(contenders):
        seconds = statistics.median(row[at] for row in times)
        per_device = rows * length / seconds / jax.device_count()
        flops = contender.facts.flops_per_token or of_all
        found.append(
            StepMeasurement(
                name=contender.name,
                package=contender.package,
                tokens=length,
                rows=rows,
                ratio=ratio(at, 0),
                ratio_to={name: ratio(at, to) for name, to in peers.items()},
                seconds=seconds,
                least_seconds=min(row[at] for row in times),
                tokens_per_second=per_device,
                mfu=per_device * flops / peak if peak else None,
                loss=losses[contender.name],
                remark=contender.remark,
                **asdict(contender.facts),
            )
        )
    return found
