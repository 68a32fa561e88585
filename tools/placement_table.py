"""Print the placement table of docs/sharding.md: every tensor, its logical axes and its mesh axes.

    python tools/placement_table.py [key=value ...]

The numbers are those of `moe-shard explain mixtral-tiny` on fsdp 2 x tensor 2 x expert 4, with
moe_dispatch_no_expert_sharding on and off; nothing is compiled and no device is needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from moe_shard.errors import EXIT_DONE, UserError, run_command

MESH = (
    "num_simulated_devices=16",
    "ici_fsdp_parallelism=2",
    "ici_tensor_parallelism=2",
    "ici_expert_parallelism=4",
)
FLAG = "moe_dispatch_no_expert_sharding"
REPEATED = " as stored"
"""Arrays with this ending are a parameter again, where the step first reads it."""

Table = list[tuple[str, str, str, str]]


def main() -> int:
    """Explain twice and print one Markdown table."""
    print(markdown(sys.argv[1:]))
    return EXIT_DONE


def markdown(overrides: list[str]) -> str:
    """Return the table as Markdown.

    Args:
        overrides: `key=value` arguments after those of the mesh.

    Raises:
        UserError: what `moe-shard explain` refuses.
    """
    on = _explain([*overrides, f"{FLAG}=true"])
    off = _explain([*overrides, f"{FLAG}=false"])
    lines = [
        "| tensor | logical axes | mesh axes, flag on | flag off |",
        "|---|---|---|---|",
    ]
    for kind in ("parameters", "activations"):
        lines.append(f"| **{kind}** | | | |")
        lines += [f"| {' | '.join(row)} |" for row in _rows(on[kind], off[kind])]
    return "\n".join(lines)


def _rows(on: list[dict[str, Any]], off: list[dict[str, Any]]) -> Table:
    by_name = {array["name"]: array for array in off}
    rows: Table = []
    for array in on:
        if array["name"].endswith(REPEATED):
            continue
        other = by_name[array["name"]]
        placed, without = _mesh_axes(array), _mesh_axes(other)
        axes, axes_off = _logical_axes(array), _logical_axes(other)
        same = placed == without and axes == axes_off
        rows.append((array["name"], axes, placed, "the same" if same else without))
    return rows


def _logical_axes(array: dict[str, Any]) -> str:
    return ", ".join(f"`{axis}`" if axis else "-" for axis in array["logical_axes"])


def _mesh_axes(array: dict[str, Any]) -> str:
    dims = ("·".join(dim["mesh_axes"]) or "-" for dim in array["dims"])
    return ", ".join(dims)


def _explain(overrides: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "moe_shard", "explain", "mixtral-tiny", *MESH, *overrides]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, cwd=root, check=False
    )
    if done.returncode:
        raise UserError(done.stderr.strip().removeprefix("error: "))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    run_command(main)
