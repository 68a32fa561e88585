"""Train a model, as `moe-shard train` does: python -m moe_shard.train MODEL [key=value ...]."""

import sys

from moe_shard.cli.train import main
from moe_shard.errors import run_command

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:], prog="python -m moe_shard.train"))
