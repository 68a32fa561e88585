"""Compile the training step for hardware that is not there: collectives, verdict, memory.

    moe-shard compile mixtral-8x7b mi355x:8 per_device_batch_size=11

TARGET is a file in configs/hardware/, a colon, and a TPU topology (v5e:2x4, v5p:4x4x2) or a number
of devices (h100:8, cpu:8). The compilers come with `make targets`; no accelerator is needed, and
none is used. Exit code 1 when the step does not fit in memory, or when --expect or
--max-rematerializations does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_shard.checkpoints.resolve import MODEL_HELP, load_model
from moe_shard.config import list_models
from moe_shard.config.hardware import list_hardware
from moe_shard.errors import EXIT_DONE, EXIT_FINDING, CommandParser, UserError
from moe_shard.files import write_text
from moe_shard.lowering.verdict_names import VERDICTS
from moe_shard.quiet import hide_accelerator_warnings
from moe_shard.terminal import Console

if TYPE_CHECKING:
    from moe_shard.config import Config
    from moe_shard.runtime.compile_target import TargetReport


def main(argv: Sequence[str], prog: str = "moe-shard compile") -> int:
    """Compile the step, print the report, and judge it."""
    arguments = _arguments(argv, prog)
    config = load_model(arguments.model, arguments.overrides)
    config.require_built()
    # Only now: a mistyped key is reported before jax has been loaded.
    with hide_accelerator_warnings():
        from moe_shard.cli.page_file import page_path
        from moe_shard.runtime.compile_target import compile_for_target
        from moe_shard.runtime.targets.target import parse_target

    target = parse_target(arguments.target)
    page = page_path(arguments.html) if arguments.html else None
    folder = _dump_folder(arguments.dump)
    with hide_accelerator_warnings():
        report = compile_for_target(config, target)
    if folder is not None:
        _dump(report, folder)
    if page is not None:
        with hide_accelerator_warnings():
            _write_page(page, config, report)
    notes = Console(stderr=True, soft_wrap=True, highlight=False, style="yellow")
    for line in report.notes:
        notes.print(f"note: {line}", markup=False)
    for line in report.conflicts:
        notes.print(f"rule conflict: {line}", markup=False)
    if arguments.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        _print(report)
    return _judge(report, arguments.expect, arguments.max_rematerializations)


def _write_page(path: Path, config: Config, report: TargetReport) -> None:
    """Write the page, flag off next to flag on; one of them is compiled already."""
    from moe_shard.cli.page_file import write_page
    from moe_shard.lowering.page import Panel
    from moe_shard.runtime.compile_target import compile_for_target

    def panel(name: str, shown: TargetReport) -> Panel:
        lines = (*shown.bounds, *shown.estimate_lines) if shown.hlo else ()
        end = (shown.compiled_with,)
        memory = shown.target.hardware.hbm_bytes
        return Panel(name, shown.lowering, (*lines, *end), memory, shown.refusal)

    title = f"{config.run.run_name} on {report.target.text}"
    moe = config.model.moe
    if moe is None:
        panels = [panel("as configured", report)]
    else:
        other = replace(
            config,
            model=replace(
                config.model,
                moe=replace(
                    moe, moe_dispatch_no_expert_sharding=not moe.moe_dispatch_no_expert_sharding
                ),
            ),
        )
        reports = {
            moe.moe_dispatch_no_expert_sharding: report,
            not moe.moe_dispatch_no_expert_sharding: compile_for_target(other, report.target),
        }
        panels = [
            panel(f"moe_dispatch_no_expert_sharding: {str(flag).lower()}", reports[flag])
            for flag in (False, True)
        ]
    write_page(path, title, panels)
    print(f"page: {path}", file=sys.stderr)


def _print(report: TargetReport) -> None:
    # A pipe has no width: 80 columns would fold the table.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if report.hlo is not None:
        report.lowering.render_table(console)
        records = [
            line
            for each in (report.attention, report.moe)
            for layers, record in each.items()
            for line in record.lines(layers)
        ]
        for line in (*records, *report.loss, *report.bounds, *report.estimate_lines):
            console.print(line, markup=False)
        console.print(report.memory_line(), markup=False)
    console.print(f"parameters: {report.num_params:,}")
    done = "compiled" if report.hlo is not None else "refused"
    console.print(
        f"{done} in {report.compile_time_s:.1f} s for {report.target.text}: {report.compiled_with}",
        markup=False,
    )


def _judge(report: TargetReport, expected: str | None, most: int | None) -> int:
    code = EXIT_DONE
    if report.refusal is not None:
        print(report.refusal, file=sys.stderr)
        return EXIT_FINDING
    if report.fits is False:
        print(
            f"{report.memory_line()}\nfix: a smaller per_device_batch_size with more "
            "gradient_accumulation_steps, or more devices",
            file=sys.stderr,
        )
        code = EXIT_FINDING
    if expected and report.lowering.verdict != expected:
        verdict = f"{report.lowering.verdict} (as compiled for {report.lowering.backend})"
        print(f"expected {expected}, found {verdict}", file=sys.stderr)
        code = EXIT_FINDING
    found = report.lowering.rematerializations
    if most is not None and found > most:
        print(
            f"{found} involuntary full rematerializations, at most {most} expected: see the "
            "warnings for where",
            file=sys.stderr,
        )
        code = EXIT_FINDING
    return code


def _dump_folder(path: str | None) -> Path | None:
    """Create the folder, before minutes of compiling."""
    if path is None:
        return None
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dump {path}: {error.strerror}\nfix: a folder to write to") from error
    return Path(path)


def _dump(report: TargetReport, folder: Path) -> None:
    """Write what `moe-shard report` and `moe-shard diff` read."""
    write_text(folder / "lowering.json", json.dumps(report.to_json(), indent=1) + "\n")
    if report.hlo is not None:
        write_text(folder / "train_step.after_optimizations.txt", report.hlo)


def _arguments(argv: Sequence[str], prog: str) -> argparse.Namespace:
    parser = CommandParser(
        prog=prog,
        description="Compile the training step for hardware that is not there.",
        epilog=f"Models: {', '.join(list_models())}. Hardware: {', '.join(list_hardware())}.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("target", metavar="TARGET", help="v5e:2x4, v5p:4x4x2, h100:8, mi355x:8")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="overrides the model's"
    )
    parser.add_argument("--expect", choices=VERDICTS, help="exit with 1 on any other verdict")
    parser.add_argument(
        "--max-rematerializations",
        metavar="N",
        type=int,
        help="exit with 1 when the partitioner replicates more than N tensors to re-shard them",
    )
    parser.add_argument("--dump", metavar="DIR", help="keep the optimized HLO and the report here")
    parser.add_argument(
        "--html", metavar="FILE", help="also write a page, the flag off beside the flag on"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_intermixed_args(argv)
