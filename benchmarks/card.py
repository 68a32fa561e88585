"""Measure everything worth knowing on one accelerator, in ten minutes and by one command.

    python -m benchmarks.card [--out card.json] [--seconds 590] [--only PART ...]
    python -m benchmarks.card --tiny      the same parts at sizes for a CPU, to see that they run

Each part is a command of the package in a process of its own, with a limit of its own; what fails
or runs out of time is recorded with its last line, and the other parts go on. The record is written
after every part, and printed at the end.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.curve import computed, train
from benchmarks.markdown import versions
from moe_shard.config import load_config
from moe_shard.config.hardware import find_hardware
from moe_shard.errors import (
    EXIT_DONE,
    EXIT_FINDING,
    CommandParser,
    Finding,
    UserError,
    run_command,
)
from moe_shard.files import write_text

_ALONE = (
    *("ici_data_parallelism=-1", "ici_fsdp_parallelism=1", "ici_expert_parallelism=1"),
    *("enable_checkpointing=false", "enable_tensorboard=false", "tokenizer_path=bytes"),
)
_PROFILED = ("profile=true", "skip_first_n_steps_for_profiler=8", "profiler_steps=2")
_STEPS = 14
_WARM = 4
"""Steps that are not counted: the first compile, the next fill the device's queue."""
_SPEED = ("step_time_s", "tokens_per_sec_per_device", "tflops_per_sec_per_device", "mfu")
_FREE = 0.93
"""Part of a device's memory that a program may take; the rest is the runtime's."""
_WHOLE_CARD = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(_FREE)}
_SHARED_CARD = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""What jax takes of a GPU's memory when it starts: by default three quarters."""
_TINY = (
    *("base_emb_dim=32", "base_mlp_dim=32", "base_moe_mlp_dim=32", "base_num_decoder_layers=1"),
    *("base_num_query_heads=4", "base_num_kv_heads=4", "head_dim=8", "num_simulated_devices=1"),
)


@dataclass(frozen=True)
class Work:
    """Describe a model at a size.

    Attributes:
        model: its name.
        keys: what differs from its file.
        steps: updates of a run.
    """

    model: str
    keys: tuple[str, ...]
    steps: int = _STEPS

    def with_keys(self, *keys: str) -> Work:
        """Return the same with further keys, which go before those that are there."""
        return Work(self.model, (*self.keys, *keys), self.steps)


@dataclass(frozen=True)
class Bench:
    """Run parts within a deadline.

    Attributes:
        folder: where runs are written.
        until: `time.monotonic()` at which all must have ended.
        tiny: whether sizes are for a CPU.
    """

    folder: Path
    until: float
    tiny: bool

    def work(self, model: str, *keys: str) -> Work:
        """Return a model at its size, or at that for a CPU."""
        if self.tiny:
            small = [key for key in keys if key.startswith(("moe_dispatch", "capacity", "profile"))]
            length = ("max_target_length=32", "per_device_batch_size=2", "vocab_size=320")
            return Work("mixtral-tiny", (*_ALONE, *_TINY, *length, *small), 4)
        return Work(model, (*_ALONE, *keys))

    def call(
        self, command: Sequence[str], limit: float, *, alone: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run `python -m moe_shard ...`.

        Args:
            command: its arguments.
            limit: seconds that it may take.
            alone: whether jax may have the card's memory for itself.

        Raises:
            UserError: it failed, or there was no time left for it.
        """
        left = min(limit, self.until - time.monotonic())
        if left < 1:
            raise UserError("no time was left for it")
        try:
            done = subprocess.run(
                [sys.executable, "-m", "moe_shard", *command],
                capture_output=True,
                text=True,
                timeout=left,
                env=os.environ | (_WHOLE_CARD if alone else _SHARED_CARD),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"not done within {left:.0f} s") from None
        if done.returncode not in (EXIT_DONE, EXIT_FINDING):
            raise UserError(_last_line(done.stderr or done.stdout))
        return done

    def report(self, command: Sequence[str], limit: float, *, alone: bool = True) -> Any:
        """Run a command that prints JSON, and return that; arguments and errors as `call`."""
        name, *arguments = command
        done = self.call([name, "--json", *arguments], limit, alone=alone)
        if not done.stdout.strip():
            raise UserError(_last_line(done.stderr))
        return json.loads(done.stdout)

    def train(self, work: Work, name: str, *keys: str, limit: float, steps: int = -1) -> Any:
        """Train, and return what the run recorded.

        Raises:
            UserError: it failed.
        """
        run = [f"run_name={name}", f"base_output_directory={self.folder}"]
        run.append(f"steps={work.steps if steps < 0 else steps}")
        done = self.call(["train", work.model, *work.keys, *keys, *run], limit)
        if done.returncode == EXIT_FINDING:
            raise UserError(_last_line(done.stderr))
        return recorded(self.folder / name) | {"keys": [work.model, *work.keys, *keys]}


def recorded(run: Path) -> dict[str, Any]:
    """Return speed, memory and kernel times of a run from its folder."""
    memory = json.loads((run / "lowering.json").read_text())["memory"] or {}
    found: dict[str, Any] = {"memory_bytes": memory.get("total_bytes")}
    metrics = run / "metrics.jsonl"
    lines = (
        [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    )
    if counted := lines[min(_WARM, len(lines) - 1) :]:
        for name in (
            "step_time_s",
            "tokens_per_sec_per_device",
            "tflops_per_sec_per_device",
            "mfu",
        ):
            values = [each[name] for each in counted]
            found[name] = None if None in values else statistics.median(values)
        found["loss"] = counted[-1]["loss"]
        found["dropped_token_fraction"] = counted[-1]["dropped_token_fraction"]
    if (times := run / "profile" / "kernel_times.json").exists():
        found["kernel_times"] = json.loads(times.read_text())
    return found


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1][:300]


def _olmoe(bench: Bench, *keys: str) -> Work:
    sizes = ("base_num_decoder_layers=8", "per_device_batch_size=4", "max_target_length=2048")
    return bench.work("olmoe-1b-7b", *sizes, *keys)


def ragged(bench: Bench) -> Any:
    """Train olmoe-1b-7b with 8 layers, 4 sequences of 2048, dropless; with its kernel times."""
    return bench.train(_olmoe(bench, "moe_dispatch=ragged"), "ragged", *_profile(bench), limit=150)


def gather(bench: Bench) -> Any:
    """Train the same by capacity."""
    work = _olmoe(bench, "moe_dispatch=gather", "capacity_factor=1.25")
    return bench.train(work, "gather", *_profile(bench), limit=110)


def same_flops(bench: Bench) -> Any:
    """Train both with experts assigned round-robin: equal FLOPs, so that times compare."""
    found = {}
    for name in ("ragged", "gather"):
        keys = (f"moe_dispatch={name}", "capacity_factor=1.0", "force_load_balance=true")
        found[name] = bench.train(_olmoe(bench, *keys), f"same-{name}", limit=100)
    ratio = found["ragged"]["step_time_s"] / found["gather"]["step_time_s"]
    return found | {"ragged_over_gather": ratio}


def largest_batch(bench: Bench) -> Any:
    """Train olmoe-1b-7b with 8 layers at S 4096 with the most sequences that fit."""
    work = bench.work(
        "olmoe-1b-7b",
        *("base_num_decoder_layers=8", "max_target_length=4096", "moe_dispatch=ragged"),
    )
    return _largest(bench, work, "largest", 180)


def mixtral(bench: Bench) -> Any:
    """Train mixtral-8x7b with 2 layers at S 4096 with the most sequences that fit."""
    work = bench.work(
        "mixtral-8x7b",
        *("base_num_decoder_layers=2", "max_target_length=4096", "moe_dispatch=gather"),
        *("capacity_factor=1.0",),
    )
    return _largest(bench, work, "mixtral", 180)


def _largest(bench: Bench, work: Work, name: str, limit: float) -> Any:
    """Compile for one and two sequences, go on in a straight line, and train what should fit."""
    until = time.monotonic() + limit

    def bytes_of(rows: int) -> int:
        keys = (f"per_device_batch_size={rows}",)
        found = bench.train(work, f"{name}-{rows}", *keys, limit=until - time.monotonic(), steps=0)
        return int(found["memory_bytes"])

    one, two = bytes_of(1), bytes_of(2)
    rows = max(1, 1 + int((_FREE * _device_memory(bench) - one) // max(two - one, 1)))
    rows = min(rows, 4) if bench.tiny else rows
    failed: list[int] = []
    while rows >= 1:
        try:
            keys = (f"per_device_batch_size={rows}",)
            found = bench.train(work, f"{name}-most", *keys, limit=until - time.monotonic())
            return found | {"rows": rows, "did_not_fit": failed}
        except UserError as error:
            if "memory" not in str(error).lower():
                raise
            failed.append(rows)
            rows -= 1
    raise UserError("not one sequence fits")


def _device_memory(bench: Bench) -> float:
    if bench.tiny:
        return 1e9
    # In a process that ends: one that holds the card would keep the others from it.
    code = "import jax; print(jax.devices()[0].device_kind)"
    kind = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    hardware = find_hardware(kind.stdout.strip())
    if hardware is None or hardware.hbm_bytes is None:
        raise UserError(f"the memory of {kind.stdout.strip()!r} is not in configs/hardware/")
    return float(hardware.hbm_bytes)


def grouped(bench: Bench) -> Any:
    """Measure the grouped products: share of the card's own matmul, forward, dx, dw."""
    return bench.report(["bench", "--tune"], 180)


def steps(bench: Bench) -> Any:
    """Time attention kernels and torch in one whole step of two layers, in turns."""
    work = bench.work(
        "olmoe-1b-7b",
        *("base_num_decoder_layers=2", "per_device_batch_size=4", "max_target_length=2048"),
        *("capacity_factor=1.0",),
    )
    command = ["bench", "--step", "--rounds", "3" if bench.tiny else "9"]
    command += ["--tokens", "32" if bench.tiny else "2048", "--variants", "gather"]
    for kind in _attention_kinds(bench):
        command += ["--variant", f"{kind}: moe_dispatch=gather attention={kind}"]
    # Not MaxText: it wants a mesh of its own choice on one device.
    command += ["--against", "transformers", "--", work.model, *work.keys]
    return bench.report(command, 200, alone=False)  # torch has its part of the memory


def survival(bench: Bench) -> Any:
    """Train a small model alone, again, and killed three times; compare all records bit for bit."""
    sizes = ("base_emb_dim=1024", "base_moe_mlp_dim=512", "base_num_decoder_layers=4")
    heads = ("base_num_query_heads=8", "base_num_kv_heads=8", "num_experts=16", "vocab_size=512")
    batch = ("num_experts_per_tok=4", "per_device_batch_size=4", "max_target_length=1024")
    work = bench.work("olmoe-1b-7b", *sizes, *heads, *batch, "moe_dispatch=ragged")
    saved = ("enable_checkpointing=true", "checkpoint_period=5", "steps=40")
    command = ["moe-shard", "train", work.model, *work.keys, *saved]
    for name, at in (("alone", ()), ("again", ()), ("killed", (8, 18, 29))):
        train(bench.folder, name, command, at, environment=os.environ | _WHOLE_CARD)
    runs = [computed(bench.folder / "outputs" / name) for name in ("alone", "again", "killed")]
    return {
        "keys": [work.model, *work.keys, *saved],
        "records": len(runs[0]),
        "again_equal": runs[1] == runs[0],
        "killed_equal": runs[2] == runs[0],
    }


def _attention_kinds(bench: Bench) -> tuple[str, ...]:
    return ("dot_product",) if bench.tiny else ("dot_product", "flash", "cudnn_flash_jax")


def _profile(bench: Bench) -> tuple[str, ...]:
    return ("profile=true", "profiler_steps=2") if bench.tiny else _PROFILED


PARTS: dict[str, Callable[[Bench], Any]] = {
    each.__name__: each
    for each in (ragged, gather, largest_batch, mixtral, grouped, steps, same_flops, survival)
}
"""The parts, the most wanted first."""


def main(argv: Sequence[str]) -> int:
    """Run the parts, and write and print what they found."""
    parser = CommandParser(prog="python -m benchmarks.card", description="Measure one card.")
    parser.add_argument("--out", type=Path, default=Path("card.json"), help="the record")
    parser.add_argument("--seconds", type=float, default=590, help="for all parts together")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="some parts")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    arguments = parser.parse_args(argv)
    load_config("mixtral-tiny")  # a damaged checkout is reported before the minutes are spent
    content: dict[str, Any] = {"versions": versions(), "parts": {}}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), started + arguments.seconds, arguments.tiny)
        for name in arguments.only:
            print(f"{time.monotonic() - started:4.0f} s  {name}", file=sys.stderr, flush=True)
            before = time.monotonic()
            try:
                found = PARTS[name](bench)
            except (UserError, Finding, OSError, ValueError, KeyError, TypeError) as error:
                found = {"failed": str(error) or type(error).__name__}
                print(f"        failed: {found['failed']}", file=sys.stderr)
            content["parts"][name] = found | {"seconds": time.monotonic() - before}
            write_text(arguments.out, json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))
    return EXIT_DONE


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
