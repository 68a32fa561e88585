"""Write the Hugging Face directory of an imported model, or of a run that began with one.

    moe-shard export imported/mixtral Mixtral-again
    moe-shard export outputs/mixtral Mixtral-trained
    moe-shard export outputs/mixtral Mixtral-FP8 --quantize fp8

Every tensor keeps its name, shape, dtype and file; without training in between every file is the
same to the byte. Trained parameters are rounded to the checkpoint's dtypes, to nearest or, with
--stochastic-rounding SEED, by chance; how many is said. Tensors that were fp8 or mxfp4 are written
as bfloat16. With --quantize the matrices of attention, MLPs and experts (mxfp4: stacked experts)
are stored in few bits, and how far that is from the plain numbers is said. For a run, the newest
checkpoint is exported. The parameters are copied from checkpoint to files one shard at a time; no
accelerator is used. DST is written completely or not at all. Of a run with enable_lora=true the
adapters are written, in peft's format; with --merge-adapters the model that they make.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_shard.errors import EXIT_DONE, CommandParser
from moe_shard.quiet import hide_accelerator_warnings
from moe_shard.terminal import Console


def main(argv: Sequence[str], prog: str = "moe-shard export") -> int:
    """Plan the files and write them."""
    parser = CommandParser(prog=prog, description="Write a Hugging Face directory.")
    parser.add_argument("source", metavar="SRC", help="imported model or run")
    parser.add_argument("target", metavar="DST", type=Path, help="new directory")
    parser.add_argument(
        "--stochastic-rounding",
        metavar="SEED",
        type=_seed,
        help="round to either neighbour, each as likely as it is near",
    )
    parser.add_argument(
        "--quantize",
        choices=("fp8", "mxfp4"),
        help="store projections in 8 bits with a scale for each 128 x 128, or stacked experts in 4",
    )
    parser.add_argument(
        "--merge-adapters",
        action="store_true",
        help="of a run with adapters, write the whole model with these added to its weights",
    )
    arguments = parser.parse_args(argv)
    # The CPU is enough, and an accelerator may be in use.
    os.environ["JAX_PLATFORMS"] = "cpu"
    with hide_accelerator_warnings():
        from moe_shard.checkpoints.imported import export_model

    # A pipe has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    export_model(
        arguments.source,
        arguments.target,
        console=console,
        stochastic=arguments.stochastic_rounding,
        quantize=arguments.quantize,
        merge=arguments.merge_adapters,
    )
    console.print(f"exported: {arguments.target}", markup=False)
    return EXIT_DONE


def _seed(text: str) -> int:
    """Read a seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError("SEED is a whole number below 2**32")
    return int(text)
