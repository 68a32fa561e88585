"""Show what a Hugging Face model directory holds, from config.json and the tensors' headers.

    moe-shard detect Qwen3-30B-A3B
    moe-shard detect DIR hf_family=mine.yml --json
    moe-shard detect path/to/config.json

Family, layers, experts, dims, dtypes, quantisation, whether the head is the embedding, tokenizer,
and which tensors are used or carried; the settings with --json. What training would refuse is
refused here. No weight is read but embedding and head, where both are stored; nothing is written.
Of a config.json alone, what the file says is shown; which tensors there are is not known then.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_shard.errors import EXIT_DONE, CommandParser, UserError


def main(argv: Sequence[str], prog: str = "moe-shard detect") -> int:
    """Read the directory and print what is in it."""
    parser = CommandParser(prog=prog, description="Show what a model directory holds.")
    parser.add_argument("directory", metavar="DIR", help="a model directory, or its config.json")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides the model's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_intermixed_args(argv)
    # Only now: bad usage is reported before the rest has been loaded.
    from moe_shard.autoep.detect import CONFIG
    from moe_shard.autoep.not_a_model import refuse_foreign
    from moe_shard.files import expanded

    where = expanded(arguments.directory)
    if where.name == CONFIG and os.path.isfile(where):
        read = _read_alone
    elif os.path.isfile(where / CONFIG):  # also of a name that is too long for the system
        read = _read_directory
    else:
        refuse_foreign(arguments.directory)
        raise UserError(
            f"{arguments.directory}: no {CONFIG} in it\nfix: a Hugging Face model directory; "
            "`moe-shard explain` shows other models, `moe-shard status` runs"
        )
    told, warnings, lines = read(where, arguments.overrides)
    if arguments.json:
        print(json.dumps(told, indent=1))
        return EXIT_DONE
    for line in warnings:
        print(f"note: {line}", file=sys.stderr)
    for line in lines:
        print(line)
    return EXIT_DONE


_Read = tuple[dict[str, Any], tuple[str, ...], Iterator[str]]
"""What was read: as one object, what to note of it, and in lines."""


def _read_directory(where: Path, overrides: Sequence[str]) -> _Read:
    from moe_shard.autoep.description import describe_directory, description_lines
    from moe_shard.checkpoints.resolve import load_directory

    config, found = load_directory(where, overrides)
    config.require_built()
    told = describe_directory(where, config, found)
    return told, config.warnings, description_lines(told, config, found)


def _read_alone(where: Path, overrides: Sequence[str]) -> _Read:
    from moe_shard.autoep.description import describe_alone, lines_alone
    from moe_shard.checkpoints.resolve import load_without_weights

    config, found = load_without_weights(where, overrides)
    config.require_built()
    told = describe_alone(where, config, found)
    return told, config.warnings, lines_alone(told, config, found)
