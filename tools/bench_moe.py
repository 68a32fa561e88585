"""Time one MoE layer: each dispatch strategy, flag on and off, as ratios from one run.

    python tools/bench_moe.py [--tokens 128 1024] [--rounds 15] [--json]

The layer is B8 M256 H512 E8 top-2 capacity factor 1, float32, forward and backward, with the
expert axis over all devices. Without an accelerator it simulates 8 devices on the CPU; a ratio of
times there tells about arithmetic and memory, not about a network.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from importlib.metadata import version

import jax
from rich.console import Console
from rich.table import Table

from moe_shard.bench import LayerSize, Measurement, measure
from moe_shard.config import load_config
from moe_shard.errors import EXIT_DONE, run_command
from moe_shard.sharding.mesh import make_mesh
from moe_shard.training.devices import start_devices


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024], metavar="S")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each program")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.rounds < 1 or min(args.tokens) < 1:
        parser.error("--rounds and --tokens take numbers from 1")
    console = Console(stderr=True)
    where = start_devices(num_simulated=8)
    devices = jax.device_count()
    config = load_config("mixtral-tiny", [f"ici_expert_parallelism={devices}"])
    mesh = make_mesh(config.mesh)
    size = LayerSize(rows=devices, experts=devices if devices > 2 else 8)
    measurements = []
    with console.status("") as status:
        for tokens in args.tokens:
            measurements += measure(
                mesh, replace(size, tokens=tokens), rounds=args.rounds, progress=status.update
            )
    if args.json:
        print(json.dumps(_json(where, measurements), indent=1))
    else:
        _print(where, measurements)
    return EXIT_DONE


def _json(where: str, measurements: list[Measurement]) -> dict[str, object]:
    return {
        "hardware": where,
        "num_devices": jax.device_count(),
        "jax": version("jax"),
        "measurements": [measurement.to_json() for measurement in measurements],
    }


def _print(where: str, measurements: list[Measurement]) -> None:
    table = Table(title=f"one MoE layer, forward and backward, jax {version('jax')}")
    for name in ("S", "strategy", "flag", "verdict"):
        table.add_column(name)
    for name in ("time ratio", "median ms", "collectives", "kB moved", "temp MB", "GFLOP"):
        table.add_column(name, justify="right")
    for m in measurements:
        table.add_row(
            str(m.tokens),
            m.strategy,
            "on" if m.flag else "off",
            m.verdict or "",
            f"{m.ratio:.2f}",
            f"{1e3 * m.seconds:.1f}",
            str(m.collectives),
            f"{m.collective_bytes / 1e3:,.1f}",
            "" if m.temp_bytes is None else f"{m.temp_bytes / 1e6:.1f}",
            "" if m.gflops is None else f"{m.gflops:.2f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(where)
    console.print(table)
    console.print("time ratio: to the first row of the same S, median over rounds taken in turn")


if __name__ == "__main__":
    run_command(main)
