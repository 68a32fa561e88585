"""Show where the time of profiled steps went, by stage of the model and pass of the step.

    moe-shard profile outputs/mixtral-tiny
    moe-shard profile DIR --hlo step.after_optimizations.txt

DIR is the folder of a run that was made with profile=true, or any folder with a profile of jax
(*.xplane.pb). A run keeps the text of its step beside the profile; for any other program name its
HLO text, or a folder written by XLA's --xla_dump_to, with --hlo.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_shard.errors import EXIT_DONE, CommandParser, UserError
from moe_shard.files import find_below
from moe_shard.lowering.sources import module_file, parse_stages, read_text, recorded_mesh
from moe_shard.quiet import hide_accelerator_warnings


def main(argv: Sequence[str], prog: str = "moe-shard profile") -> int:
    """Read the profile and the program, and print the table or one JSON object."""
    parser = CommandParser(prog=prog, description="Show where the time of profiled steps went.")
    parser.add_argument("folder", metavar="DIR", help="a run's folder, or one with a profile")
    parser.add_argument("--hlo", metavar="PATH", help="HLO text of the profiled program, or a dump")
    parser.add_argument(
        "--stages",
        metavar="WORD=STAGE,...",
        help="your own scopes and the stages they stand for, e.g. wi_0=experts,gate=router",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder\nfix: the folder of a run with profile=true")
    stages = parse_stages(arguments.stages) if arguments.stages else None
    # Only now: --help and bad usage are answered before jax has been loaded.
    from moe_shard.terminal import Console

    with hide_accelerator_warnings():
        from moe_shard.lowering.collectives import extract_collectives
        from moe_shard.training.profile import PROGRAM, read_times

        if arguments.hlo:
            file = module_file(arguments.hlo)
        else:
            file = next(iter(sorted(find_below(folder, PROGRAM), key=_written)), None)
            if file is None:
                raise UserError(
                    f"{folder} does not hold the text of the profiled program ({PROGRAM})\n"
                    "fix: name it with --hlo PATH: a file of dump_hlo=true or of --xla_dump_to"
                )
        program = extract_collectives(read_text(file), recorded_mesh(file), stages=stages)
        found = read_times(folder, program)
    if arguments.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        found.render_table(Console(width=None if sys.stdout.isatty() else 140, highlight=False))
    return EXIT_DONE


def _written(file: Path) -> tuple[bool, float]:
    """Sort a profile's own text before a dump of the run, and newer before older."""
    return file.parent.name == "hlo", -file.stat().st_mtime
