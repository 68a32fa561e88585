"""Explain where every array is on the mesh, as `moe-shard explain` does."""

import sys

from moe_shard.cli.explain import main
from moe_shard.errors import run_command

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:], prog="explain_sharding.py"))
