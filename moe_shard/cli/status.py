"""Show how a run is doing: a glance in the terminal, or a page with its curves.

    moe-shard status outputs/mixtral-tiny
    moe-shard status outputs/mixtral-tiny --html run.html

RUN is the folder of a run, which may be going on, or its address in a bucket. Nothing there is
written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from moe_shard.cli.page_file import page_path
from moe_shard.errors import EXIT_DONE, CommandParser, UserError
from moe_shard.files import write_text


def main(argv: Sequence[str], prog: str = "moe-shard status") -> int:
    """Read the run's files, and print lines or one JSON object, or write the page."""
    parser = CommandParser(prog=prog, description="Show how a run is doing.")
    parser.add_argument("folder", metavar="RUN", help="a run's folder, or its address in a bucket")
    parser.add_argument("--html", metavar="FILE", help="write a page with the curves")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    path = page_path(arguments.html) if arguments.html else None
    # Only now: --help and bad usage are answered before anything is loaded.
    from moe_shard.checkpoints.run_files import opened
    from moe_shard.terminal import Console
    from moe_shard.training.concerns import concerns
    from moe_shard.training.run_status import read_status, spark
    from moe_shard.training.status_lines import norm_rows, status_lines
    from moe_shard.training.status_page import render_status

    status = read_status(opened(arguments.folder))
    if path is not None:
        try:
            write_text(path, render_status(status))
        except OSError as error:
            raise UserError(
                f"--html {path}: {error.strerror}\nfix: a file in a folder that is there"
            ) from error
    if arguments.json:
        print(json.dumps(status.to_json() | {"concerns": list(concerns(status))}, indent=1))
        return EXIT_DONE
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(status.name, style="bold", markup=False)
    for line in concerns(status):
        console.print(f"! {line}", style="yellow", markup=False, soft_wrap=True)
    for line in status_lines(status):
        console.print(line, markup=False, soft_wrap=True)
    curves = status.curves()
    width = max(console.width - 3 - max(map(len, curves), default=0) - 26, 10)
    for name, points in curves.items():
        label = name.ljust(max(map(len, curves)))
        ends = f"{points[0][1]:10.4g} -> {points[-1][1]:<10.4g}"
        console.print(f"{label}  {ends}  {spark(points, width)}", markup=False)
    for kind, *numbers in norm_rows(status.layers[-1]) if status.layers else []:
        console.print(f"{kind:16}" + "".join(f"{each:>18}" for each in numbers), markup=False)
    if path is not None:
        console.print(f"page: {path}", markup=False)
    return EXIT_DONE
