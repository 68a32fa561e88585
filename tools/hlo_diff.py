"""Compare two lowerings, as `moe-shard diff` does."""

import sys

from moe_shard.cli.diff import main
from moe_shard.errors import run_command

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:], prog="hlo_diff.py"))
