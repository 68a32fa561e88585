"""Run a configuration: compile, report, train."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, cast

import jax

from moe_shard.autoep.directory import keep_hf
from moe_shard.config import Config
from moe_shard.config.hardware import find_hardware
from moe_shard.config.strategies import find_strategy
from moe_shard.files import write_text
from moe_shard.layers.attention_record import AttentionRecord
from moe_shard.lowering.reports import LoweringReport
from moe_shard.moe.record import MoERecord
from moe_shard.program.step import make_program
from moe_shard.runtime.compile import (
    CompiledStep,
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
    out_of_memory_is_a_finding,
    report_step,
)
from moe_shard.runtime.compile_cache import cache_problems, start_compile_cache
from moe_shard.runtime.devices import start_devices
from moe_shard.runtime.team import Team
from moe_shard.terminal import Console, LastingOutput
from moe_shard.training.changed_settings import Kind, batch_line, find_changes, keep_earlier
from moe_shard.training.copies import kept_in_bucket
from moe_shard.training.goodput import WallTime
from moe_shard.training.loop import Outcome, Trainer
from moe_shard.training.profile import show_times
from moe_shard.training.run_folder import open_run
from moe_shard.training.state_memory import state_lines
from moe_shard.training.wandb_log import require_wandb

Records = Mapping[str, Mapping[str, AttentionRecord | MoERecord]]
"""What `lowering.json` says of layers: key -> layers -> their record."""


def run(config: Config, team: Team | None = None) -> Outcome:
    """Compile the step, report and save what it lowers to, then train.

    Args:
        config: configuration of the run.
        team: the processes of the run; None: this one, whose signals are the caller's.

    Raises:
        UserError: the configuration does not fit the devices, or input cannot be read.
        Finding: the step does not fit in memory, or the loss is no longer finite.
    """
    # Where output is a file, the default of 80 columns would wrap the table.
    require_wandb(config)
    team = team or Team(signals=False)
    notes = Console(
        file=cast(IO[str], LastingOutput(sys.stderr)),
        soft_wrap=True,
        highlight=False,
        style="yellow",
    )

    def note(line: str) -> None:
        notes.print(f"note: {line}", markup=False)

    console = Console(
        file=cast(IO[str], LastingOutput(sys.stdout, note)),
        width=None if sys.stdout.isatty() else 120,
        highlight=False,
    )
    device_line = start_devices(config.mesh.num_simulated_devices, team)
    console.quiet = notes.quiet = jax.process_index() > 0
    console.print(device_line)
    for line in config.detected:
        console.print(line, markup=False, soft_wrap=True)
    cache = start_compile_cache(config.run.jax_cache_dir)
    sharding, changes_nothing = lay_out(config)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    for line in (*changes_nothing, *cache.notes):
        note(line)
    writer = jax.process_index() == 0
    with team.failing(), cache_problems(note), out_of_memory_is_a_finding():
        program = make_program(config, sharding)
        for line in program.notes:
            note(line)
        with (
            open_run(config.run, writer=writer) as folder,
            kept_in_bucket(folder, writer=writer, say=say) as copied_after,
            WallTime(folder, writer=writer) as wall,
            Trainer(config, program, folder, wall=wall, say=say) as trainer,
            # Here too: what is opened above waits for the other processes when it is closed.
            team.failing(),
            out_of_memory_is_a_finding(),
        ):
            copied_after(trainer.checkpointer)
            if writer:
                _keep_settings(config, folder, console, note)
                if config.run.load_parameters_path:
                    keep_hf(
                        config.run.load_parameters_path,
                        folder,
                        config.run.hf_family,
                        config.model.num_decoder_layers,
                        config.run.weights_outside_directory,
                        config.model.mtp.mtp_num_layers,
                    )
            with console.status("compiling the training step"), wall.part("compile"):
                step = compile_step(program, compiler_options(config, sharding.platform))
            in_cache = cache.words(step.cached)
            console.print(
                f"compiled in {step.seconds:.1f} s{in_cache}", markup=False, soft_wrap=True
            )
            if step.warnings_unknown:
                note("warnings of the partitioner are not known: another program kept this one")
            report = report_step(step, sharding, jax.default_backend())
            for line in sharding.conflict_lines():
                notes.print(f"rule conflict: {line}", markup=False)
            report.render_table(console)
            records: Records = {
                "attention": attention_of_step(config, sharding),
                "moe": moe_records(config, sharding),
            }
            hardware = find_hardware(jax.devices()[0].device_kind)
            lines = [
                line
                for each in records.values()
                for layers, record in each.items()
                for line in record.lines(layers)
            ]
            lines += state_lines(config, program)
            lines += loss_lines(config, sharding) + option_lines(step)
            lines += bound_lines(config, program, report)
            if found := estimate_step(config, hardware, report):
                lines += estimate_lines(config, found, sharding.mesh.size)
            for line in lines:
                console.print(line, markup=False)
            console.print(f"parameters: {program.model.num_params:,}")
            if writer:
                _keep(config, step, report, records, folder)
            outcome = trainer.train(step.executable, console, team)
            if config.train.profile and writer and outcome.last is not None:
                assert report.extraction is not None, "the step was compiled"
                show_times(folder / "profile", step.hlo, report.extraction, console)
    if outcome.last is not None and (spent := wall.goodput()):
        console.print(spent.line())
    _conclude(console, config, report, folder, outcome)
    return outcome


def _keep_settings(
    config: Config, folder: Path, console: Console, note: Callable[[str], None]
) -> None:
    """Say in what this start differs from the last one, and keep the settings of both."""
    changes = find_changes(folder, config)
    if changes:
        changes.require_possible(strict=config.train.resume_strict)
        if changes.resumes and (line := batch_line(folder, config, jax.device_count())):
            note(line)
        for line in changes.lines():
            if line.startswith(Kind.RUN.value):
                note(line)
            else:
                console.print(line, markup=False, soft_wrap=True)
    text = config.to_yaml()
    if kept := keep_earlier(folder, text):
        console.print(f"settings of the last start: {_as_typed(kept)}", markup=False)
    write_text(folder / "config.yml", text)


def _keep(
    config: Config,
    step: CompiledStep,
    report: LoweringReport,
    records: Records,
    folder: Path,
) -> None:
    kept = report.to_json() | {
        what: {layers: record.to_json() for layers, record in each.items()}
        for what, each in records.items()
    }
    write_text(folder / "lowering.json", json.dumps(kept, indent=1) + "\n")
    if config.train.dump_hlo:
        (folder / "hlo").mkdir(exist_ok=True)
        write_text(folder / "hlo" / "train_step.after_optimizations.txt", step.hlo)


def _conclude(
    console: Console, config: Config, report: LoweringReport, folder: Path, outcome: Outcome
) -> None:
    """Print how the run ended, where its files are, and how to see the other lowering."""
    shown = _as_typed(folder)
    who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    if outcome.stopped_by:
        kept = "a checkpoint was saved; " if config.train.enable_checkpointing else ""
        quiet, console.quiet = console.quiet, False  # each process says why it ends
        console.print(
            f"{who}stopped by {outcome.stopped_by} after step {outcome.updates}: {kept}"
            "the same command continues",
            soft_wrap=True,
        )
        console.quiet = quiet
    elif outcome.ended_by:
        console.print(f"ended after step {outcome.updates}: {outcome.ended_by}")
    elif config.train.steps == 0:
        console.print("steps=0: compiled and reported only")
    elif outcome.last is None:
        console.print(f"already at step {outcome.updates}: a larger steps= trains on")
    console.print(f"files: {shown}", markup=False)
    moe = config.model.moe
    flag = (
        moe is not None
        and moe.moe_dispatch_no_expert_sharding
        and not find_strategy(moe.moe_dispatch).always_moves_tokens
    )
    if report.verdict == "expert-parallel" and flag:
        python, name = _as_typed(Path(sys.executable)), f"{config.run.run_name}-flag-off"
        console.print(
            "the same step with the flag off:\n"
            f"  {python} -m moe_shard.train {shown}/config.yml run_name={name} "
            "moe_dispatch_no_expert_sharding=false steps=0 dump_hlo=true\n"
            f"  {python} -m moe_shard report {_as_typed(folder.with_name(name))}",
            markup=False,
            soft_wrap=True,  # one line, so that it can be pasted
        )


def _as_typed(path: Path) -> str:
    """Format a path relative to the current folder if it is inside."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
