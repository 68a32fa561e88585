"""Write a Hugging Face model directory, as `moe-shard export` does."""

import sys

from moe_shard.cli.export import main
from moe_shard.errors import run_command

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:], prog="export_hf.py"))
