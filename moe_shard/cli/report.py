"""Report which collectives a compiled program runs, over which axis, and how many bytes they move.

    moe-shard report step.txt --mesh data=1,fsdp=1,expert=8 --expect expert-parallel

PATH is an HLO text file, "-" for standard input, a folder written by XLA's --xla_dump_to, or the
folder of a run (whose lowering.json gives the mesh). Exit code 1 when --expect does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_shard.errors import EXIT_DONE, EXIT_FINDING, CommandParser
from moe_shard.lowering.sources import parse_expert_axes, parse_mesh, parse_stages
from moe_shard.lowering.verdict_names import VERDICTS

if TYPE_CHECKING:
    from moe_shard.lowering.reports import LoweringReport


def main(argv: Sequence[str], prog: str = "moe-shard report") -> int:
    """Read the module, print the report, and compare the verdict."""
    arguments = _arguments(argv, prog)
    # Only now: --help and bad usage are answered before the reader is loaded.
    from moe_shard.cli.page_file import page_path, write_page
    from moe_shard.lowering.page import Panel
    from moe_shard.terminal import Console

    report = _read(arguments.path, arguments)
    if arguments.html:
        panels = [Panel(arguments.path, report)]
        if arguments.beside:
            panels.insert(0, Panel(arguments.beside, _read(arguments.beside, arguments)))
        write_page(page_path(arguments.html), "What the step moves", panels)
        print(f"page: {arguments.html}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(report.to_json(), indent=2))
        for warning in report.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    else:
        # A pipe has no width: 80 columns would fold the table.
        report.render_table(Console(width=None if sys.stdout.isatty() else 120))
    if arguments.expect and report.verdict != arguments.expect:
        found = f"{report.verdict} (as compiled for {report.backend})"
        print(f"expected {arguments.expect}, found {found}", file=sys.stderr)
        return EXIT_FINDING
    return EXIT_DONE


def _read(given: str, arguments: argparse.Namespace) -> LoweringReport:
    """Report on a program; its mesh is the given one, a run's, or that of the text."""
    from moe_shard.lowering.api import report

    return report(
        Path(given),
        mesh=parse_mesh(arguments.mesh) if arguments.mesh else None,
        expert_axes=parse_expert_axes(arguments.expert_axes),
        stages=parse_stages(arguments.stages) if arguments.stages else None,
        count_further_rounds=arguments.further_rounds,
    )


def _arguments(argv: Sequence[str], prog: str) -> argparse.Namespace:
    parser = CommandParser(prog=prog, description="Report the collectives of a compiled program.")
    parser.add_argument("path", metavar="PATH", help="HLO text, dump folder, run folder, or -")
    parser.add_argument(
        "--mesh",
        help="axis=size,... in device order, e.g. data=1,fsdp=1,expert=8, where the text does not "
        "name it",
    )
    parser.add_argument(
        "--expert-axes",
        metavar="AXES",
        help="mesh axes of the experts (default: expert, or those that split the experts' weights)",
    )
    parser.add_argument(
        "--stages",
        metavar="WORD=STAGE,...",
        help="your own scopes and the stages they stand for, e.g. wi_0=experts,gate=router",
    )
    parser.add_argument("--expect", choices=VERDICTS, help="exit with 1 on any other verdict")
    parser.add_argument(
        "--further-rounds",
        action="store_true",
        help="count once the exchanges that ragged dispatch makes only where routing exceeds "
        "what the first one holds",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", metavar="FILE", help="also write the report as a page")
    parser.add_argument(
        "--beside", metavar="PATH", help="a second program for the page, such as the flag off"
    )
    arguments = parser.parse_args(argv)
    if arguments.beside and not arguments.html:
        parser.error("--beside shows a second program on the page of --html FILE")
    return arguments
