"""Kill a training again and again, and compare it bit for bit with one that was left alone.

    python -m tests.soak.kills [--kills 100] [--processes 1 2] [--seed 0]

A kill is one of SIGKILL, SIGTERM and SIGINT, to one of the processes, at a random moment of a
start: while it starts or compiles, restores, steps, saves or ends. After each, all processes have
to be gone within a minute, with the codes of the contract, without a traceback or a C++ stack, and
the next start goes on. In the end all metrics that are computed have to equal the other run's, bit
for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TINY = (
    *("mixtral-tiny", "base_num_decoder_layers=1", "base_emb_dim=32", "base_num_query_heads=2"),
    *("base_num_kv_heads=1", "head_dim=16", "base_mlp_dim=32", "base_moe_mlp_dim=32"),
    *("max_target_length=32", "per_device_batch_size=1", "num_simulated_devices=4"),
    *("ici_expert_parallelism=4", "checkpoint_period=10", "log_period=50"),
)
COMPUTED = (
    *("loss", "ce_loss", "aux_loss", "grad_norm", "learning_rate"),
    *("dropped_token_fraction", "expert_load_max_over_mean"),
)
"""The seven metrics that do not depend on the clock."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
GONE_S = 60.0
NOISE = ("Traceback", "*** Check failure", "    @     0x", "terminate called")


@dataclass
class Start:
    """Hold the processes of one start, and where their output goes."""

    processes: list[subprocess.Popen[bytes]]
    outputs: list[Path]

    def texts(self) -> list[str]:
        return [path.read_text(errors="replace") for path in self.outputs]


def start(folder: Path, count: int, arguments: Sequence[str], **environment: str) -> Start:
    """Start a run of `count` processes on four simulated devices."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    processes, outputs = [], []
    for index in range(count):
        own = {"JAX_PROCESS_ID": str(index)} if count > 1 else {}
        outputs.append(folder / f"output-{index}.txt")
        with outputs[-1].open("wb") as output:
            command = [sys.executable, "-m", "moe_shard.train", *TINY, *arguments]
            processes.append(
                subprocess.Popen(command, cwd=folder, env=env | own, stdout=output, stderr=output)
            )
    return Start(processes, outputs)


def layer_records(run: Path) -> list[dict[str, Any]]:
    """Read the records of layers.jsonl, but for the memory, which is that of a process."""
    return [{**each, "memory": None} for each in records(run, "layers.jsonl")]


def records(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Read the whole lines of a run's metrics."""
    path = run / name
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1] if line]


def wait(started: Start, seconds: float) -> float:
    """Wait until all processes are gone; return the seconds it took, infinite if they are not."""
    began = time.monotonic()
    for process in started.processes:
        try:
            process.wait(max(began + seconds - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            for each in started.processes:
                each.kill()
                each.wait()
            return float("inf")
    return time.monotonic() - began


def moment(started: Start, run: Path, rng: random.Random) -> str:
    """Wait for a random moment of a start, and name it."""
    kind = rng.choice(("start-up", "compile", "restore", "step", "save", "end"))
    made = len(records(run))
    deadline = time.monotonic() + 300
    wanted = made + rng.randrange(2, 9)
    while any(p.poll() is None for p in started.processes) and time.monotonic() < deadline:
        text = started.texts()[0]
        now = len(records(run))
        if kind == "start-up":
            time.sleep(rng.uniform(0.0, 4.0))
            break
        if kind == "compile" and "simulating" in text:
            time.sleep(rng.uniform(0.0, 2.0))
            break
        if kind == "restore" and ("continuing from" in text or "parameters: " in text):
            break
        if kind == "step" and now >= wanted:
            break
        if kind == "save" and list((run / "checkpoints").glob("*tmp*")):
            break
        if kind == "end" and "stopped by" in text:
            break
        if kind == "end" and now >= wanted and started.processes[0].poll() is None:
            for process in started.processes:
                process.send_signal(signal.SIGTERM)
            wanted = 1 << 60
        time.sleep(0.005)
    return kind


def soak(folder: Path, count: int, kills: int, steps: int, rng: random.Random) -> list[str]:
    """Kill a run `kills` times and let it finish; return what was wrong."""
    wrong: list[str] = []
    arguments = (f"steps={steps}", "run_name=killed")
    run = folder / "outputs" / "killed"
    figures: Counter[str] = Counter()
    longest = 0.0
    for number in range(kills):
        started = start(folder, count, arguments)
        when = moment(started, run, rng)
        sent, victim = rng.choice(SIGNALS), rng.randrange(count)
        if started.processes[victim].poll() is None:
            started.processes[victim].send_signal(sent)
        took = wait(started, GONE_S)
        codes = [process.returncode for process in started.processes]
        figures[f"{sent.name} at {when}"] += 1
        longest = max(longest, took)
        allowed = {0, 75, -signal.SIGKILL if sent == signal.SIGKILL else 75}
        # Before Python has installed a handler, the system's default ends a process.
        if when == "start-up":
            allowed |= {-sent, 130, 1}
        noisy = [mark for mark in NOISE for text in started.texts() if mark in text]
        if took > GONE_S or not set(codes) <= allowed or (noisy and when != "start-up"):
            tail = " | ".join(text[-600:] for text in started.texts())
            wrong.append(
                f"{number}: {sent.name} to {victim} at {when}: {codes}, {took:.0f} s: {tail}"
            )
        print(f"{number + 1}: {sent.name} to process {victim} at {when}: {codes} {took:.1f} s, "
              f"{len(records(run))} steps", flush=True)  # fmt: skip
        if 0 in codes:
            print("finished: more --steps leave room for more kills", flush=True)
            break
    last = start(folder, count, arguments)
    if wait(last, 1200) == float("inf") or any(p.returncode for p in last.processes):
        wrong.append("the last start did not finish: " + last.texts()[0][-600:])
    alone = start(folder, count, (f"steps={steps}", "run_name=alone"))
    wait(alone, 1200)
    found, wanted = (
        [[each[name] for name in ("step", *COMPUTED)] for each in records(run.with_name(name))]
        for name in ("killed", "alone")
    )
    of_layers = [layer_records(run.with_name(name)) for name in ("killed", "alone")]
    if of_layers[0] != of_layers[1] or len(of_layers[0]) != steps:
        wrong.append("the records of layers.jsonl differ")
    if found != wanted or len(found) != steps:
        wrong.append(f"metrics differ: {len(found)} and {len(wanted)} records of {steps}")
    for what, times in sorted(figures.items()):
        print(f"  {times} x {what}")
    print(f"{count} processes: {kills} kills, {steps} steps, gone after {longest:.1f} s at most, "
          f"{len(wrong)} wrong", flush=True)  # fmt: skip
    return wrong


def main() -> int:
    """Run the command line; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description="Kill a training again and again.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    wrong = []
    for count in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            kills = args.kills // len(args.processes)
            wrong += soak(Path(folder), count, kills, args.steps, rng)
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
