"""Print the collectives of a model's MoE layers with moe_dispatch_no_expert_sharding on and off.

    python -m benchmarks.collectives [MODEL] [key=value ...]

One training step is compiled for simulated CPU devices, and not run. MODEL is mixtral-tiny unless
another is named.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.markdown import origin, table
from moe_shard.config import load_config
from moe_shard.errors import EXIT_DONE, UserError, run_command
from moe_shard.lowering.collectives import Collective
from moe_shard.runtime.compile_target import compile_for_target
from moe_shard.runtime.targets.target import parse_target
from moe_shard.units import human_bytes

LEAST_BYTES = 1024
"""Losses and counts are smaller, and are no part of the table."""


def main(argv: Sequence[str]) -> int:
    """Compile twice and print."""
    model, *overrides = argv if argv and "=" not in argv[0] else ["mixtral-tiny", *argv]
    config = load_config(model, overrides)
    moe = config.model.moe
    if moe is None:
        raise UserError(f"{model} has no MoE layer\nfix: name a model with num_experts above 1")
    target = parse_target(f"cpu:{config.mesh.num_simulated_devices}")
    rows = []
    for flag in (True, False):
        layer = replace(moe, moe_dispatch_no_expert_sharding=flag)
        changed = replace(config, model=replace(config.model, moe=layer))
        lowering = compile_for_target(changed, target).lowering
        inside = [each for each in lowering.collectives if _is_of_experts(each)]
        rows.append(
            [
                "on" if flag else "off",
                _sum(inside, "all-to-all"),
                _sum(inside, "all-gather"),
                _sum(inside, "all-reduce"),
                _sum(inside, "reduce-scatter"),
                f"`{lowering.verdict}`",
            ]
        )
    kinds = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter")
    print(table(["flag", *kinds, "verdict"], rows))
    command = ["python", "-m", "benchmarks.collectives", model, *overrides]
    print()
    print(
        origin(
            "compiled, not run",
            f"{config.mesh.num_simulated_devices} simulated CPU devices",
            command,
        )
    )
    return EXIT_DONE


def _is_of_experts(each: Collective) -> bool:
    return each.of_experts and each.bytes > LEAST_BYTES


def _sum(collectives: Sequence[Collective], kind: str) -> str:
    """Count and output bytes of one kind; "0" where there is none."""
    same = [each for each in collectives if each.kind == kind]
    count = sum(each.count for each in same)
    moved = human_bytes(sum(each.count * each.bytes for each in same))
    return f"{count} / {moved}" if count else "0"


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
