"""Run a command of `moe-shard`: python -m moe_shard COMMAND ..."""

from moe_shard.cli import entry

if __name__ == "__main__":
    entry()
