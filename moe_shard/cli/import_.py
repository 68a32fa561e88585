"""Import a model trained elsewhere, so that it trains and generates on any mesh.

    moe-shard import Mixtral-8x7B-v0.1 imported/mixtral
    moe-shard import runs/mine/checkpoints/5000 imported/mine --model mixtral-8x7b.yml
    python -m moe_shard.train imported/mixtral ici_expert_parallelism=8

SRC is a Hugging Face directory, or a checkpoint of MaxText's; the latter does not contain the
model's configuration, so --model names it. DST holds config.yml, params/ (read in the shards that a
mesh needs, at any EP size) and, for a Hugging Face directory, hf/ (what `moe-shard export` needs to
write it again). It is written completely or not at all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from moe_shard.errors import EXIT_DONE, CommandParser, UserError
from moe_shard.quiet import hide_accelerator_warnings
from moe_shard.terminal import Console


def main(argv: Sequence[str], prog: str = "moe-shard import") -> int:
    """Detect the model, read its tensors, and write the directory."""
    parser = CommandParser(prog=prog, description="Import a model trained elsewhere.")
    parser.add_argument(
        "source", metavar="SRC", type=Path, help="directory with config.json, or with items"
    )
    parser.add_argument("target", metavar="DST", type=Path, help="new folder")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides the model's")
    parser.add_argument("--model", help="of a MaxText checkpoint: its name or .yml file")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.model and (arguments.source / "config.json").is_file():
        raise UserError(
            f"--model={arguments.model}, but {arguments.source} has a config.json that names its "
            "model\nfix: leave --model out"
        )
    # Only now: bad usage is reported before the rest has been loaded.
    from moe_shard.checkpoints.resolve import load_model

    config = load_model(arguments.model or str(arguments.source), arguments.overrides)
    config.require_built()
    # Only now: a mistyped key is reported before jax has been loaded.
    with hide_accelerator_warnings():
        from moe_shard.checkpoints.imported import import_model
        from moe_shard.models.params import describe
        from moe_shard.runtime.compile import lay_out
        from moe_shard.runtime.devices import start_devices

        # A pipe has no width of its own.
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        console.print(start_devices(config.mesh.num_simulated_devices))
    sharding, changes_nothing = lay_out(config)
    for line in changes_nothing:
        print(f"note: {line}", file=sys.stderr)
    import_model(
        arguments.source,
        arguments.target,
        config,
        # Nothing is trained here: float32 would double the folder and hold the same numbers.
        describe(config.as_stored().model, sharding).specs,
        family=config.run.hf_family,
        console=console,
    )
    console.print(
        f"imported: {arguments.target}\npython -m moe_shard.train {arguments.target}", markup=False
    )
    return EXIT_DONE
