"""Write the Hugging Face directory of an imported model, or of a run that began with one.

    python tools/export_hf.py imported/mixtral Mixtral-again
    python tools/export_hf.py outputs/mixtral Mixtral-trained

Every tensor has the name, shape, dtype and file that it had; without training in between every file
is the same to the byte. What was fp8 or mxfp4 is bfloat16. Of a run the newest checkpoint is taken.
The parameters go from checkpoint to files a part at a time, a shard of the run that saved them; no
accelerator is used. DST is there whole or not at all.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

from moe_shard.errors import EXIT_DONE, CommandParser, run_command


def main() -> int:
    """Lay out the files, fill them."""
    parser = CommandParser(prog="export_hf.py", description="Write a Hugging Face directory.")
    parser.add_argument("source", metavar="SRC", type=Path, help="imported model or run")
    parser.add_argument("target", metavar="DST", type=Path, help="new directory")
    arguments = parser.parse_args()
    # An accelerator would only be taken from whoever is using it.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from moe_shard.training.imported import export_model

    # A pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    export_model(arguments.source, arguments.target, console=console)
    console.print(f"exported: {arguments.target}", markup=False)
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
