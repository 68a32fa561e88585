"""Time one MoE layer: every dispatch strategy side by side, on balanced and on skewed routing.

    moe-shard bench [--tokens 128 1024] [--rounds 15] [--size small|large] [--json]
    moe-shard bench --tune [MODEL|GxNxAxP ...] [--seconds 150] [--json]

Forward and backward, with the expert axis over all devices. The small layer (on CPU the default) is
B8 M256 H512 E8 top-2 capacity factor 1 in float32; the large one (on an accelerator) has the width
of an 8-expert Mixtral, M4096 H14336, in bfloat16. Without an accelerator 8 devices are simulated on
the CPU: a ratio of times there reflects arithmetic and memory, not a network.

With --tune the kernels of the grouped products are measured instead, tile by tile, on the card that
is there, and the best ones are written to a table that every later run on such a card reads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

from rich.table import Table

from moe_shard.cli.tune_tiles import add_arguments, tune_tiles
from moe_shard.config import load_config
from moe_shard.errors import EXIT_DONE, CommandParser
from moe_shard.quiet import hide_accelerator_warnings
from moe_shard.terminal import Console
from moe_shard.units import human_bytes

if TYPE_CHECKING:
    from moe_shard.runtime.layer_bench import Measurement


def main(argv: Sequence[str], prog: str = "moe-shard bench") -> int:
    """Time the layer and print a table or one JSON object; with --step, the whole step."""
    if "--step" in argv:
        from moe_shard.cli import bench_step

        return bench_step.time_steps([each for each in argv if each != "--step"], f"{prog} --step")
    parser = CommandParser(
        prog=prog, description="Time one MoE layer: every dispatch strategy, flag on and off."
    )
    parser.add_argument("--step", action="store_true", help="the whole step: see --step --help")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024], metavar="S")
    parser.add_argument("--size", choices=("small", "large"), help="of the layer")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each program")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.rounds < 1 or min(args.tokens) < 1:
        parser.error("--rounds and --tokens must be at least 1")
    if args.tune is not None:
        return tune_tiles(args)
    # Only now: --help and bad usage are answered before jax has been loaded.
    with hide_accelerator_warnings():
        import jax
        import jax.numpy as jnp

        from moe_shard.runtime.devices import start_devices
        from moe_shard.runtime.layer_bench import LayerSize, measure
        from moe_shard.sharding.mesh import mesh_from_config

        where = start_devices(num_simulated=8)
    console = Console(stderr=True)
    devices = jax.device_count()
    config = load_config("mixtral-tiny", [f"ici_expert_parallelism={devices}"])
    mesh = mesh_from_config(config.mesh)
    sizes = {
        "small": LayerSize(),
        "large": LayerSize(model_dim=4096, hidden_dim=14336, dtype=jnp.bfloat16),
    }
    by_default = "small" if jax.default_backend() == "cpu" else "large"
    size = replace(sizes[args.size or by_default], rows=max(devices, 8), experts=max(devices, 8))
    measurements = []
    with console.status("") as status:
        for tokens in args.tokens:
            measurements += measure(
                mesh, replace(size, tokens=tokens), rounds=args.rounds, progress=status.update
            )
    if args.json:
        print(json.dumps(_json(where, devices, measurements), indent=1))
    else:
        _print(where, measurements)
    return EXIT_DONE


def _json(where: str, devices: int, measurements: list[Measurement]) -> dict[str, object]:
    return {
        "hardware": where,
        "num_devices": devices,
        "jax": version("jax"),
        "measurements": [measurement.to_json() for measurement in measurements],
    }


def _print(where: str, measurements: list[Measurement]) -> None:
    table = Table(title=f"one MoE layer, forward and backward, jax {version('jax')}")
    for name in ("S", "routing", "strategy", "verdict"):
        table.add_column(name)
    for name in ("time", "ms", "wire", "x least", "FLOP x ideal", "temp MB", "dropped"):
        table.add_column(name, justify="right")
    for name in ("tokens/s", "of peak"):
        table.add_column(name, justify="right")
    for before, m in zip([None, *measurements], measurements, strict=False):
        if before and (before.tokens, before.routing) != (m.tokens, m.routing):
            table.add_section()
        table.add_row(
            str(m.tokens),
            m.routing,
            m.strategy,
            m.verdict or "",
            f"{m.ratio:.2f}",
            f"{1e3 * m.seconds:.1f}",
            human_bytes(m.wire_bytes),
            "" if m.wire_over_bound is None else f"{m.wire_over_bound:.2f}",
            f"{m.flops_over_ideal:.2f}",
            "" if m.temp_bytes is None else f"{m.temp_bytes / 1e6:.1f}",
            f"{100 * m.dropped:.1f}%",
            f"{m.tokens_per_second:,.0f}",
            "" if m.fraction_of_peak is None else f"{100 * m.fraction_of_peak:.1f}%",
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(where)
    console.print(table)
    console.print(
        "time: relative to the first line of the same S and routing, median of interleaved rounds\n"
        "wire, FLOP, temp, tokens/s: per device; FLOP of the experts' products, relative to what\n"
        "the routed tokens need; further rounds of ragged (skewed) count in the time only"
    )
