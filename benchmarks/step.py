"""Print the table of whole training steps: this package's, MaxText's and transformers' in turns.

    python -m benchmarks.step [MODEL] [key=value ...] [--tokens 512 1024] [--rounds 7]
                              [--plot FILE.svg] [--write docs/results.md]

The programs are run, on the accelerator that is there or on 8 simulated CPU devices. MaxText takes
part where it is installed (`.venv-maxtext/bin/python -m benchmarks.step`), transformers where torch
is. --write puts the table between the marks `<!-- step -->` of a file. The same measurements as an
object: `moe-shard bench --step --json`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bars import bars
from benchmarks.markdown import origin, replace_section, table
from moe_shard.cli import bench
from moe_shard.errors import EXIT_DONE, UserError, run_command
from moe_shard.files import write_text
from moe_shard.units import human_bytes

SECTION = "step"


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write where it is asked for."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--write", type=Path)
    own, passed = parser.parse_known_args(argv)
    if "--json" in passed:
        raise UserError("benchmarks.step prints Markdown\nfix: moe-shard bench --step --json")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        bench.main(["--step", *passed, "--json"], prog="python -m benchmarks.step")
    found = json.loads(printed.getvalue())
    command = ["python", "-m", "benchmarks.step", *passed]
    hardware = f"{found['num_devices']} devices, {found['hardware']}{_load(found)}"
    packages = sorted({each["package"] for each in found["steps"]} - {"moe_shard"})
    source = origin("measured", ", ".join([hardware, *packages]), command)
    text = "\n\n".join([markdown(found["steps"]), *found["notes"], source])
    print(text)
    if own.plot:
        write_text(own.plot, plot(found["steps"]))
    if own.write:
        shown = f"\n\n![times of the steps]({own.plot.name})" if own.plot else ""
        replace_section(own.write, SECTION, text + shown)
    return EXIT_DONE


def _load(found: dict[str, Any]) -> str:
    """Say how busy a CPU was, which times depend on and ratios less so."""
    if "CPU" not in found["hardware"]:
        return ""
    return f", {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def markdown(steps: Sequence[dict[str, Any]]) -> str:
    """Return the table: a line a step, times relative to `gather` and to the other packages.

    Args:
        steps: objects of `moe-shard bench --step --json`.
    """
    peers = list(dict.fromkeys(peer for each in steps for peer in each["ratio_to"]))
    head = ["S", "step", "time", *(f"time, x {peer}" for peer in peers), "MoE sent, x the least"]
    head += ["FLOPs, x ideal", "scratch", "compiled in", "tokens/s a device", "MFU", "verdict"]
    rows = []
    for each in steps:
        ratios = [each["ratio_to"].get(peer) for peer in peers]
        name = f"{each['name']} ({each['remark']})" if each["remark"] else f"`{each['name']}`"
        rows.append(
            [
                str(each["tokens"]),
                name,
                f"{each['ratio']:.2f}",
                *map(_number, ratios),
                _number(each["wire_over_bound"]),
                _number(each["flops_over_ideal"]),
                "-" if each["temp_bytes"] is None else human_bytes(each["temp_bytes"]),
                "-" if each["compile_seconds"] is None else f"{each['compile_seconds']:.0f} s",
                f"{each['tokens_per_second']:,.0f}",
                "-" if each["mfu"] is None else f"{each['mfu']:.1%}",
                f"`{each['verdict']}`" if each["verdict"] else "-",
            ]
        )
    return table(head, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def plot(steps: Sequence[dict[str, Any]]) -> str:
    """Return a picture of the times, relative to the first step of each S."""
    return bars(
        "time of a training step, relative to gather",
        [(f"{each['name']}, S {each['tokens']}", each["ratio"]) for each in steps],
    )


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
