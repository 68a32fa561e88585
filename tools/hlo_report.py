"""Report which collectives a compiled program runs, as `moe-shard report` does."""

import sys

from moe_shard.cli.report import main
from moe_shard.errors import run_command

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:], prog="hlo_report.py"))
