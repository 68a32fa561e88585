"""Show what a Hugging Face model directory holds, from config.json and the tensors' headers.

    moe-shard detect Qwen3-30B-A3B
    moe-shard detect DIR hf_family=mine.yml --json

Family, layers, experts, dims, dtypes, quantisation, whether the head is the embedding, tokenizer,
and which tensors are used or carried; the settings with --json. What training would refuse is
refused here. No weight is read but embedding and head, where both are stored; nothing is written.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from moe_shard.errors import EXIT_DONE, CommandParser, UserError


def main(argv: Sequence[str], prog: str = "moe-shard detect") -> int:
    """Read the directory and print what is in it."""
    parser = CommandParser(prog=prog, description="Show what a model directory holds.")
    parser.add_argument("directory", metavar="DIR", help="a Hugging Face directory")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides the model's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_intermixed_args(argv)
    # Only now: bad usage is reported before the rest has been loaded.
    from moe_shard.autoep.description import describe_directory, description_lines
    from moe_shard.autoep.detect import CONFIG
    from moe_shard.autoep.not_a_model import refuse_foreign
    from moe_shard.checkpoints.resolve import load_directory
    from moe_shard.files import expanded

    directory = expanded(arguments.directory)
    if not os.path.isfile(directory / CONFIG):  # also of a name that is too long for the system
        refuse_foreign(arguments.directory)
        raise UserError(
            f"{arguments.directory}: no {CONFIG} in it\nfix: a Hugging Face model directory; "
            "`moe-shard explain` shows other models, `moe-shard status` runs"
        )
    config, found = load_directory(directory, arguments.overrides)
    config.require_built()
    if arguments.json:
        print(json.dumps(describe_directory(directory, config, found), indent=1))
        return EXIT_DONE
    for line in config.warnings:
        print(f"note: {line}", file=sys.stderr)
    for line in description_lines(directory, config, found):
        print(line)
    return EXIT_DONE
