"""Explain where every array of a model is on the mesh, and which rule of the table put it there.

    moe-shard explain mixtral-8x7b num_simulated_devices=64
    moe-shard explain mixtral-8x7b --rules maxtext/rules.yml ici_expert_parallelism=8

The mesh has num_simulated_devices devices; none is needed, and nothing is compiled. With --rules
the file's own mesh axes and rules are checked instead, as Flax would apply them; axes have size 2
unless ici_<axis>_parallelism is given. Exit code 1 with --strict when a dim loses its mesh axes to
another one, or a rule of --rules names a mesh axis twice or one that the file does not have.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_shard.checkpoints.resolve import MODEL_HELP, load_model
from moe_shard.errors import EXIT_DONE, EXIT_FINDING, CommandParser
from moe_shard.quiet import hide_accelerator_warnings
from moe_shard.terminal import Console


def main(argv: Sequence[str], prog: str = "moe-shard explain") -> int:
    """Trace the model, resolve its rules, and print where every array is."""
    parser = CommandParser(
        prog=prog, description="Explain where every array is, and by which rule."
    )
    # Optional for argparse only, which would report key=value as missing too.
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides the model's")
    parser.add_argument("--rules", metavar="FILE", help="check this file's mesh_axes and rules")
    parser.add_argument("--strict", action="store_true", help="exit with 1 on a conflict")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.model is None:
        parser.error("MODEL is missing, for example mixtral-tiny")
    if arguments.rules is None:
        config = load_model(arguments.model, arguments.overrides)
        config.require_built()
    # Only now: a mistyped key is reported before jax has been loaded. The CPU is enough, and an
    # accelerator may be in use.
    os.environ["JAX_PLATFORMS"] = "cpu"
    with hide_accelerator_warnings():
        from moe_shard.runtime.explained import explain_config, explain_table
        from moe_shard.sharding.explain.printed import print_explanation

        if arguments.rules is None:
            explanation = explain_config(config)
        else:
            explanation = explain_table(arguments.model, arguments.overrides, Path(arguments.rules))
    if arguments.json:
        print(json.dumps(explanation.to_json(), indent=1))
    else:
        # A pipe has no width of its own.
        console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
        print_explanation(explanation, console)
    if arguments.strict and not explanation.is_strict:
        conflicts = sum(not each.only_if for each in explanation.conflicts)
        errors = sum(each.level == "error" for each in explanation.lint)
        print(f"--strict: conflicts: {conflicts}, errors in the table: {errors}", file=sys.stderr)
        return EXIT_FINDING
    return EXIT_DONE
