"""Compile the step for hardware that is not there, as `moe-shard compile` does."""

import sys

from moe_shard.cli.compile import main
from moe_shard.errors import run_command

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:], prog="compile_for.py"))
