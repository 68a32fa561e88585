"""Compare a step's gradient, weights and norm with NumPy's, however the work is divided.

    python -m tests.program.grid [--processes 1 2] [--experts 1 2 4 8] [--microbatches 1 2 4]

One global batch of 32 sequences, in float32, on eight devices: expert axis 1, 2, 4 or 8 (the rest
is data parallelism, FSDP at 2), held by one process or two of four devices each, in 1, 2 or 4
microbatches; nothing is dropped. The judge is the decoder in float64 NumPy and its gradient, which
shares no code. Errors are relative to a tensor's largest element.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from moe_shard.config import Config
from moe_shard.program.step import make_program
from moe_shard.runtime.devices import start_devices
from moe_shard.runtime.team import Team
from tests.models.build import (
    NO_DROPS,
    QUICK,
    annotator,
    architecture,
    errors,
    random_batch,
    random_params,
    small_config,
)
from tests.models.oracle import dense_grads

# As in test_step.py: the change of the weights is the gradient, not the weights' rounding.
RATE = 1e4
KEYS = (
    *("base_num_decoder_layers=2", "optimizer=sgd", f"learning_rate={RATE}"),
    *("warmup_steps_fraction=0", "gradient_clipping_threshold=0", NO_DROPS),
)
ROWS = 32
EXPERTS, MICROBATCHES, PROCESSES = (1, 2, 4, 8), (1, 2, 4), (1, 2)
LIMIT = 1e-5
ROOT = Path(__file__).parents[2]


def configured(experts: int, microbatches: int) -> Config:
    rest = "fsdp" if experts == 2 else "data"
    return small_config(
        {"expert": experts, rest: 8 // experts},
        *KEYS,
        f"per_device_batch_size={ROWS // 8 // microbatches}",
        f"gradient_accumulation_steps={microbatches}",
    )


@functools.cache
def reference() -> tuple[float, Any]:
    """Compute loss and gradient of the whole batch in float64 NumPy."""
    config = configured(1, 1)
    batch = {name: a[0] for name, a in random_batch(rows=ROWS).items()}
    return dense_grads(random_params(config), batch, architecture(config))


def compare(experts: int, microbatches: int) -> dict[str, float]:
    """Run one step on all devices of all processes; return the largest errors.

    Returns:
        `gradient` and `weights`: of any parameter; `router`: of the routers' gradient; `norm`: of
        the global norm on any device of this process; `loss`.
    """
    config = configured(experts, microbatches)
    program = make_program(config, annotator(config))
    compiled = program.step.lower(program.abstract_state, program.abstract_batch).compile(QUICK)
    params = random_params(config)
    shapes = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.abstract_state)
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    batch = {
        name: a.reshape(microbatches, ROWS // microbatches, -1)
        for name, a in random_batch(rows=ROWS).items()
    }
    state = jax.device_put(shapes._replace(params=params), places)
    after, metrics = compiled(state, jax.device_put(batch, program.batch_sharding))
    new = process_allgather(after.params, tiled=True)
    loss, grads = reference()
    norm = math.sqrt(sum(float(np.sum(g**2)) for g in jax.tree.leaves(grads)))
    norms = [float(shard.data) for shard in metrics["grad_norm"].addressable_shards]
    assert len(norms) == jax.local_device_count()
    found = errors(jax.tree.map(lambda a, b: (a - b) / RATE, params, new), grads)
    stepped = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
    return {
        "gradient": max(found.values()),
        "router": max(error for name, error in found.items() if "router" in name),
        "weights": max(errors(new, stepped).values()),
        "norm": max(abs(each / norm - 1) for each in norms),
        "loss": abs(float(metrics["loss"]) / loss - 1),
    }


Case = tuple[int, int]


def in_two_processes(cases: Sequence[Case]) -> list[list[dict[str, float]]]:
    """Compare cases in two processes of four devices; return what each of them found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.program.grid", "--child", json.dumps(cases)],
            env=shared | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]
    outputs = [child.communicate() for child in children]
    assert not any(child.returncode for child in children), outputs
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def _table(rows: Iterable[tuple[int, int, int, dict[str, float]]]) -> str:
    lines = [
        "| processes | expert axis | microbatches | gradient | router's | weights | norm | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for processes, experts, microbatches, found in rows:
        shown = " | ".join(f"{value:.1e}" for value in found.values())
        lines.append(f"| {processes} | {experts} | {microbatches} | {shown} |")
    return "\n".join(lines)


def main() -> int:
    """Run the command line; return 1 if an error exceeds the limit."""
    parser = argparse.ArgumentParser(description="Compare a step with NumPy's.")
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES, choices=PROCESSES)
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS, choices=EXPERTS)
    parser.add_argument("--microbatches", type=int, nargs="+", default=MICROBATCHES)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with Team() as team:
            start_devices(8, team)
            print(json.dumps([compare(*case) for case in args.child]), flush=True)
        return 0
    cases = [(experts, a) for experts in args.experts for a in args.microbatches]
    rows = []
    if 2 in args.processes:
        # The larger error of the two, each of which has the norms of its own devices.
        pairs = zip(*in_two_processes(cases), strict=True)
        both = [{name: max(a[name], b[name]) for name in a} for a, b in pairs]
        rows += [(2, *case, found) for case, found in zip(cases, both, strict=True)]
    if 1 in args.processes:
        start_devices(8)
        rows += [(1, *case, compare(*case)) for case in cases]
    print(_table(sorted(rows, key=lambda row: row[:3])))
    worst = max(value for *_, found in rows for value in found.values())
    print(f"\nlargest error {worst:.1e} (limit {LIMIT:.0e})")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
