"""Print what models lower to on hardware that is not there, with the flag on and off.

    python -m benchmarks.targets                                    the table of mixtral-8x7b
    python -m benchmarks.targets "qwen3-30b-a3b v6e:8x8 per_device_batch_size=1" --flag on

Each argument is what `moe-shard compile` takes. The programs are compiled and not run; needs
`make targets` for all but cpu, and minutes for each TPU.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import origin, table
from moe_shard.errors import EXIT_DONE, EXIT_USAGE, CommandParser, UserError, run_command
from moe_shard.units import human_bytes

WHOLE_MODEL = (
    "mixtral-8x7b mi355x:8 per_device_batch_size=11",
    "mixtral-8x7b h100:32 per_device_batch_size=4",
    "mixtral-8x7b v5p:4x4x2 per_device_batch_size=7",
    "mixtral-8x7b v6e:16x16 per_device_batch_size=2",
    "mixtral-8x7b tpu7x:4x4x4 per_device_batch_size=6",
)
FLAG = "moe_dispatch_no_expert_sharding"
FLAGS = {"on": "true", "off": "false"}
HEAD = (
    "program",
    "flag",
    "verdict",
    "all-to-all",
    "MoE on the wire, x the least",
    "experts' FLOPs, x the least",
    "all collectives",
    "memory",
    "compiled in",
)


def main(argv: Sequence[str]) -> int:
    """Compile every program and print."""
    parser = CommandParser(prog="python -m benchmarks.targets", description="A table of targets.")
    parser.add_argument(
        "programs", metavar='"MODEL TARGET [key=value ...]"', nargs="*", default=WHOLE_MODEL
    )
    parser.add_argument("--flag", choices=FLAGS, nargs="+", default=list(FLAGS))
    arguments = parser.parse_args(argv)
    rows = []
    for program in arguments.programs:
        for flag in arguments.flag:
            print(f"compiling {program}, flag {flag}", file=sys.stderr)
            rows.append([f"`{program}`", flag, *_cells(shlex.split(program), flag)])
    print(table(HEAD, rows))
    print()
    command = ["python", "-m", "benchmarks.targets", *argv]
    print(origin("compiled, not run", "hardware as named in each line", command))
    return EXIT_DONE


def _cells(program: Sequence[str], flag: str) -> list[str]:
    """Compile one program and read its report.

    Raises:
        UserError: as `moe-shard compile` refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "moe_shard", "compile", *program, f"{FLAG}={FLAGS[flag]}"]
        done = subprocess.run(
            [*command, "--dump", folder], capture_output=True, text=True, check=False
        )
        if done.returncode == EXIT_USAGE:
            raise UserError(done.stderr.strip().rpartition("error: ")[2])
        report = json.loads((Path(folder) / "lowering.json").read_text())
    return [
        f"`{report['verdict']}`",
        str(report["totals"].get("all-to-all", {"count": 0})["count"]),
        _over_the_least(done.stdout, "exchange"),
        _over_the_least(done.stdout, "products"),
        human_bytes(sum(total["bytes"] for total in report["totals"].values())),
        _memory(report),
        f"{report['compile_time_s']:.0f} s",
    ]


def _over_the_least(printed: str, what: str) -> str:
    """Read "82.7 GB, 1.00" from a line of bounds; "-" where the report has none."""
    found = re.search(
        rf"^MoE {what} per device: (\S+ \S+?)(?: on the wire)?, (\S+) x", printed, re.M
    )
    return f"{found[1]}, {found[2]}" if found else "-"


def _memory(report: dict[str, Any]) -> str:
    memory = report["memory"]
    if not memory:
        return "-"
    return human_bytes(memory["total_bytes"]) + (
        " (does not fit)" if report["fits"] is False else ""
    )


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
