"""Continue prompts with a model.

    moe-shard generate MODEL|CHECKPOINT "prompt" ["prompt" ...] [key=value ...] [--json]

MODEL is a name in configs/models/, a .yml file or a Hugging Face directory; CHECKPOINT is the
folder of a run, or of one of its checkpoints. Several prompts are continued at
once, each as if it were alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from moe_shard.config import list_models
from moe_shard.errors import CommandParser, UserError
from moe_shard.quiet import hide_accelerator_warnings
from moe_shard.runtime.team import Team

_OVERRIDE = re.compile(r"[A-Za-z_]\w*=")


def main(argv: Sequence[str], prog: str = "moe-shard generate") -> int:
    """Run the command line.

    Args:
        argv: MODEL or CHECKPOINT; prompts and `key=value` pairs, mixed; options.
        prog: the command's name in messages.

    Returns:
        The exit code, 0.

    Raises:
        UserError: bad input.
        Finding: the model does not fit in memory.
    """
    parser = CommandParser(
        prog=prog,
        description="Continue one or several prompts, with experts in parallel.",
        epilog=f"Models: {', '.join(list_models())}. Keys: configs/base.yml lists them all; "
        "max_new_tokens, decode_sampling_* and seed control the sampling. Put a space before a "
        "prompt that begins like key=value.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL|CHECKPOINT",
        help="a name in configs/models/, a .yml file, a Hugging Face directory, the folder of a "
        "run or of a checkpoint in it",
    )
    parser.add_argument("prompts", metavar="prompt", nargs="*", help="a text to continue")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="recompute every token from the first one: slow, the same result, for checking",
    )
    args = parser.parse_intermixed_args(argv)
    overrides = [each for each in args.prompts if _OVERRIDE.match(each)]
    prompts = [each for each in args.prompts if not _OVERRIDE.match(each)]
    if not prompts:
        raise UserError(f'no prompt\nfix: {prog} {args.model} "a text to continue"')

    with Team(signals=False) as team:
        with hide_accelerator_warnings():
            from moe_shard.inference.loading import find_source, load_generation_config
            from moe_shard.inference.texts import generate

        source = find_source(args.model)
        config = load_generation_config(source, overrides)
        team.join_seconds = config.run.jax_distributed_initialization_timeout
        cached, as_json = not args.no_cache, args.json
        generate(source, config, prompts, cached=cached, as_json=as_json, team=team)
    return 0
