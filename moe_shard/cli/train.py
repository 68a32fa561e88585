"""Train a model: compile the step, report what it lowers to, then run it.

    moe-shard train MODEL [key=value ...]

With steps=0 the step is compiled and reported, and nothing is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_shard.errors import EXIT_DONE, CommandParser, UserError
from moe_shard.runtime.team import Team

if TYPE_CHECKING:
    from moe_shard.config import Config


def main(argv: Sequence[str], prog: str = "moe-shard train") -> int:
    """Run the command line.

    Args:
        argv: MODEL and `key=value` pairs.
        prog: the command's name in --help.

    Returns:
        The exit code: 0, or what the run was stopped with (75: the same command continues).

    Raises:
        UserError: bad input.
        Finding: the step does not fit in memory, or the loss is no longer finite.
    """
    if {"-h", "--help"} & {*argv}:  # needs no other process
        _read(argv, prog)
    # First of all, as loading what follows takes a second: from here on a signal is answered, the
    # others miss this process when it dies, and the processes of the run end together.
    with Team() as team:
        config = _read(argv, prog)
        team.join_seconds = config.run.jax_distributed_initialization_timeout
        # Only now: a mistyped key is reported before jax and the rest have been loaded.
        from moe_shard.quiet import hide_accelerator_warnings

        with hide_accelerator_warnings():
            from moe_shard.training.run import run

        outcome = run(config, team)
    return team.code if outcome.stopped_by else EXIT_DONE


def _read(argv: Sequence[str], prog: str) -> Config:
    """Read the command line.

    Raises:
        UserError: it names no model, or no possible run.
    """
    from moe_shard.checkpoints.resolve import MODEL_HELP, load_model
    from moe_shard.config import list_models
    from moe_shard.training.changed_settings import keep_weight_dtype, refuse_impossible

    parser = CommandParser(
        prog=prog,
        description="Compile the training step, report what it lowers to, then train.",
        epilog=f"Models: {', '.join(list_models())}. Keys: configs/base.yml lists them all. "
        "steps=0 compiles and reports only.",
    )
    # Optional for argparse only, which would report key=value as missing too.
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides the model's")
    args = parser.parse_args(argv)
    if args.model is None:
        raise UserError(
            f"MODEL is missing\nusage: {prog} MODEL [key=value ...], for example mixtral-tiny"
        )
    config = keep_weight_dtype(load_model(args.model, args.overrides))
    config.require_built()
    refuse_impossible(config)
    return config
