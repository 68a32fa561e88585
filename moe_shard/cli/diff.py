"""Report what changed between two lowerings, by stage, mesh axis and kind of collective.

    moe-shard diff outputs/mixtral-tiny-flag-off outputs/mixtral-tiny

A and B are each the folder of a run, a folder written by XLA's --xla_dump_to, an HLO text file,
"-" for standard input, or a lowering.json. The exit code is 0 whether or not they differ (scripts
read `"same"` in --json), 2 for bad input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from moe_shard.errors import EXIT_DONE, CommandParser
from moe_shard.lowering.sources import parse_mesh


def main(argv: Sequence[str], prog: str = "moe-shard diff") -> int:
    """Read both and print the difference."""
    parser = CommandParser(prog=prog, description="Report what changed between two lowerings.")
    parser.add_argument("a", metavar="A", help="HLO text, dump or run folder, lowering.json, or -")
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument(
        "--mesh", help="axis=size,... for HLO text without a lowering.json beside it"
    )
    parser.add_argument("--mesh-a", help="the mesh of A, where the two differ")
    parser.add_argument("--mesh-b", help="the mesh of B")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    meshes = (
        parse_mesh(given, option) if given else None
        for given, option in (
            (arguments.mesh, "--mesh"),
            (arguments.mesh_a, "--mesh-a"),
            (arguments.mesh_b, "--mesh-b"),
        )
    )
    # Only now: --help and bad usage are answered before the reader is loaded.
    from moe_shard.lowering.differences import compare, load_pair
    from moe_shard.terminal import Console

    diff = compare(*load_pair(arguments.a, arguments.b, *meshes))
    if arguments.json:
        print(json.dumps(diff.to_json(), indent=2))
    else:
        diff.render(Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    return EXIT_DONE
