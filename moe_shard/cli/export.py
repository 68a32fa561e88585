"""Write the Hugging Face directory of an imported model, or of a run that began with one.

    moe-shard export imported/mixtral Mixtral-again
    moe-shard export outputs/mixtral Mixtral-trained

Every tensor has the name, shape, dtype and file that it had; without training in between every file
is the same to the byte. What was fp8 or mxfp4 is bfloat16. Of a run the newest checkpoint is taken.
The parameters go from checkpoint to files a part at a time, a shard of the run that saved them; no
accelerator is used. DST is there whole or not at all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from moe_shard.errors import EXIT_DONE, CommandParser


def main(argv: Sequence[str], prog: str = "moe-shard export") -> int:
    """Plan the files and write them."""
    parser = CommandParser(prog=prog, description="Write a Hugging Face directory.")
    parser.add_argument("source", metavar="SRC", type=Path, help="imported model or run")
    parser.add_argument("target", metavar="DST", type=Path, help="new directory")
    arguments = parser.parse_args(argv)
    # An accelerator would only be taken from whoever is using it.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from moe_shard.checkpoints.imported import export_model

    # A pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    export_model(arguments.source, arguments.target, console=console)
    console.print(f"exported: {arguments.target}", markup=False)
    return EXIT_DONE
