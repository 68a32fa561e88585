"""Time one MoE layer, as `moe-shard bench` does."""

import sys

from moe_shard.cli.bench import main
from moe_shard.errors import run_command

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:], prog="bench_moe.py"))
