"""Print the table of one MoE layer: every dispatch strategy on balanced and on skewed routing.

    python -m benchmarks.layer [--tokens 128 1024] [--rounds 15] [--size small|large]

The programs are run, on the accelerator that is there or on 8 simulated CPU devices. The same
measurements as an object: `moe-shard bench --json`.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import origin, table
from moe_shard.cli import bench
from moe_shard.errors import EXIT_DONE, UserError, run_command
from moe_shard.units import human_bytes

TITLES = (
    "routing",
    "strategy",
    "verdict",
    "sent, x the least",
    "experts' FLOPs, x ideal",
    "scratch",
    "dropped",
)


def main(argv: Sequence[str]) -> int:
    """Measure and print."""
    if "--json" in argv:
        raise UserError("benchmarks.layer prints Markdown\nfix: moe-shard bench --json")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        bench.main([*argv, "--json"], prog="python -m benchmarks.layer")
    found = json.loads(printed.getvalue())
    print(markdown(found["measurements"]))
    print()
    command = ["python", "-m", "benchmarks.layer", *argv]
    hardware = f"{found['num_devices']} devices, {found['hardware']}"
    print(origin("measured", hardware, command))
    return EXIT_DONE


def markdown(measurements: Sequence[dict[str, Any]]) -> str:
    """Return the table: a line a routing and strategy, a time for every S.

    Args:
        measurements: objects of `moe-shard bench --json`.
    """
    sizes = sorted({each["tokens"] for each in measurements})
    lines: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for each in measurements:
        lines.setdefault((each["routing"], each["strategy"]), {})[each["tokens"]] = each
    rows = []
    for (routing, strategy), by_size in lines.items():
        largest = by_size[sizes[-1]]
        sent, scratch = largest["wire_over_bound"], largest["temp_bytes"]
        rows.append(
            [
                routing,
                strategy,
                f"`{largest['verdict']}`",
                "-" if sent is None else f"{sent:.2f}",
                f"{largest['flops_over_ideal']:.2f}",
                "-" if scratch is None else human_bytes(scratch),
                f"{largest['dropped']:.1%}",
                *(f"{by_size[size]['ratio']:.2f}" for size in sizes),
            ]
        )
    return table([*TITLES, *(f"time S{size}" for size in sizes)], rows)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
