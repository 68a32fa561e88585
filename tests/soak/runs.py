"""Start runs of one or two processes, watch their output and files, and wait for their end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TINY = (
    *("mixtral-tiny", "base_num_decoder_layers=1", "base_emb_dim=32", "base_num_query_heads=2"),
    *("base_num_kv_heads=1", "head_dim=16", "base_mlp_dim=32", "base_moe_mlp_dim=32"),
    *("max_target_length=32", "per_device_batch_size=1", "num_simulated_devices=4"),
    *("ici_expert_parallelism=4", "checkpoint_period=10", "log_period=50", "dtype=float32"),
)
"""A model of a fraction of a second a step, on four devices, expert axis 4."""
COMPUTED = (
    *("loss", "ce_loss", "aux_loss", "grad_norm", "learning_rate"),
    *("dropped_token_fraction", "expert_load_max_over_mean"),
)
"""The seven metrics that do not depend on the clock."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOMENTS = ("start-up", "compile", "restore", "step", "save", "end")
GONE_S = 60.0
NOISE = ("Traceback", "*** Check failure", "    @     0x", "terminate called")


@dataclass
class Start:
    """Hold the processes of one start, and where their output goes."""

    processes: list[subprocess.Popen[bytes]]
    outputs: list[Path]

    def texts(self) -> list[str]:
        return [path.read_text(errors="replace") for path in self.outputs]

    def running(self) -> bool:
        """Return whether all processes run."""
        return all(each.poll() is None for each in self.processes)


def start(
    folder: Path,
    count: int,
    arguments: Sequence[str],
    *,
    own: Sequence[Mapping[str, str]] = (),
    program: Sequence[str] = ("moe_shard.train", *TINY),
    **environment: str,
) -> Start:
    """Start a run of `count` processes; by default of a model on four simulated devices.

    Args:
        folder: where they run.
        count: number of processes.
        arguments: of the command.
        own: variables of each process; none where it is empty.
        program: the module that is run, and the arguments before the others.
        environment: variables of all.
    """
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    processes, outputs = [], []
    for index in range(count):
        variables = env | ({"JAX_PROCESS_ID": str(index)} if count > 1 else {})
        variables |= own[index] if own else {}
        outputs.append(folder / f"output-{index}.txt")
        with outputs[-1].open("wb") as output:
            command = [sys.executable, "-m", *program, *arguments]
            processes.append(
                subprocess.Popen(command, cwd=folder, env=variables, stdout=output, stderr=output)
            )
    return Start(processes, outputs)


def records(run: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a run's metrics."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1] if line]


def computed(run: Path) -> list[list[Any]]:
    """Return the step and the seven metrics of each record of a run."""
    return [[each[name] for name in ("step", *COMPUTED)] for each in records(run)]


def checkpoints(run: Path) -> list[int]:
    """Return the numbers of a run's checkpoints, in order."""
    return sorted(int(path.name) for path in run.glob("checkpoints/*") if path.name.isdecimal())


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


def reach(started: Start, run: Path, moment: str, process: int) -> bool:
    """Wait for a moment of a start; return False if a process ended before it.

    Args:
        started: the start, just begun.
        run: folder of the run.
        moment: one of MOMENTS.
        process: whose start-up, and whose end.
    """
    made = len(records(run))

    def seen(words: str) -> Callable[[], bool]:
        return lambda: words in started.texts()[0]

    conditions: dict[str, Callable[[], bool]] = {
        "start-up": lambda: answers(started.processes[process].pid),
        "compile": seen("simulating"),
        # The first start has nothing to restore.
        "restore": lambda: seen("continuing from")() or seen("parameters: ")(),
        "step": lambda: len(records(run)) >= made + 3,
        # Not before what an earlier start has left unfinished is removed.
        "save": lambda: seen("parameters: ")() and saving(run),
        "end": lambda: len(records(run)) >= made + 3,
    }
    if not _until(started, conditions[moment]):
        return False
    if moment == "compile":
        time.sleep(0.7)
    if moment == "end":
        started.processes[-1].send_signal(signal.SIGTERM)
        return _until(started, lambda: "stopped by" in started.texts()[process])
    return started.running()


def saving(run: Path) -> bool:
    """Return whether a checkpoint is being written."""
    return bool(list(run.glob("checkpoints/*tmp*")))


def _until(started: Start, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 300
    while started.running() and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.003)
    return False


def answers(pid: int) -> bool:
    """Return whether a process has a handler for SIGTERM, of which Linux tells."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)
