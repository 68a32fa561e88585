"""Continue prompts, as `moe-shard generate` does."""

import sys

from moe_shard.cli.generate import main
from moe_shard.errors import run_command

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:], prog="python -m moe_shard.generate"))
