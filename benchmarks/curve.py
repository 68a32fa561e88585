"""Train a small model to its end, kill a second run on the way, and show the curve of both.

    python -m benchmarks.curve [--steps 2000] [--kills 10] [--model mixtral-tiny] [--seed 0]
                               [--folder DIR] [--plot FILE.svg] [--write docs/results.md]

A run is judged on text that training never sees. The second one is killed at random steps, with
SIGKILL, SIGTERM and SIGINT in turns, and started again by the same command; every record and every
evaluation has to equal the first one's, bit for bit, or the command ends with 1. With --folder both
runs are kept there, and a run that is there already is gone on with.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lines import lines
from benchmarks.markdown import origin, replace_section, table
from moe_shard.errors import EXIT_DONE, EXIT_FINDING, Finding, run_command
from moe_shard.files import write_text

SECTION = "curve"
ALONE, KILLED = "alone", "killed"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CLOCK = ("step_time_s", "tokens_per_sec_per_device", "tflops_per_sec_per_device", "mfu")
"""The numbers of a record that depend on the clock."""


def main(argv: Sequence[str]) -> int:
    """Train both runs, compare them, print, and write where it is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curve")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--model", default="mixtral-tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args(argv)
    command = ["moe-shard", "train", args.model, *settings(args.steps)]
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        train(folder, ALONE, command)
        done = train(folder, KILLED, command, killed_at(args.steps, args.kills, args.seed))
        runs = [folder / "outputs" / name for name in (ALONE, KILLED)]
        evaluations = [read(run / "eval.jsonl") for run in runs]
        records = [computed(run) for run in runs]
    equal = evaluations[0] == evaluations[1] and records[0] == records[1]
    killed = ", ".join(f"{count} x {name}" for name, count in sorted(done.items()))
    verdict = (
        f"The second run was killed {sum(done.values())} times ({killed or 'not at all'}): "
        f"{len(records[1]):,} records and {len(evaluations[1])} evaluations, "
        f"{'bit for bit those of the first' if equal else 'NOT those of the first'}."
    )
    where = f"8 simulated devices on {os.cpu_count()} CPU cores"
    own = ["--steps", str(args.steps), "--kills", str(args.kills), "--model", args.model]
    source = origin("measured", where, ["python", "-m", "benchmarks.curve", *own])
    text = "\n\n".join([markdown(evaluations[0]), verdict, source])
    print(text)
    if args.plot:
        write_text(args.plot, plot(args.model, records[0], evaluations[0]))
    if args.write:
        shown = f"\n\n![the curve]({args.plot.name})" if args.plot else ""
        replace_section(args.write, SECTION, text + shown)
    return EXIT_DONE if equal else EXIT_FINDING


def settings(steps: int) -> list[str]:
    """Return what the runs set: evaluations at every twentieth of the way."""
    return [
        *(f"steps={steps}", f"eval_interval={max(steps // 20, 1)}", "eval_steps=40"),
        *("eval_holdout_fraction=0.05", f"checkpoint_period={max(steps // 40, 1)}"),
    ]


def killed_at(steps: int, kills: int, seed: int) -> list[int]:
    """Draw the steps after which a run is killed, one in each of equal parts of it."""
    rng = random.Random(seed)
    part = steps / (kills + 1)
    return [round(part * (number + 1 + rng.uniform(-0.4, 0.4))) for number in range(kills)]


def train(
    folder: Path,
    name: str,
    command: Sequence[str],
    at: Sequence[int] = (),
    *,
    environment: Mapping[str, str] | None = None,
) -> Counter[str]:
    """Train a run to its end, killed on the way.

    Args:
        folder: where it runs; the run's own is below.
        name: its name.
        command: the command but for the name.
        at: steps after which it is killed, in rising order.
        environment: of its processes; None: this one's, on the CPU.

    Returns:
        How often each signal ended it.

    Raises:
        Finding: a start ended with a code that the contract does not have for it.
    """
    done: Counter[str] = Counter()
    root = str(Path(__file__).parents[1])
    found = os.environ | {"JAX_PLATFORMS": "cpu"} if environment is None else environment
    environment = {**found, "PYTHONPATH": os.pathsep.join([root, *_python_path(found)])}
    metrics = folder / "outputs" / name / "metrics.jsonl"
    arguments = [sys.executable, "-m", "moe_shard", *command[1:], f"run_name={name}"]
    for number, step in enumerate([*at, None]):
        with (folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                arguments, cwd=folder, env=environment, stdout=log, stderr=log
            )
        sent = SIGNALS[number % len(SIGNALS)]
        while step is not None and process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
                process.send_signal(sent)
                break
            time.sleep(0.05)
        code = process.wait()
        wanted = 0 if step is None else (-sent if sent == signal.SIGKILL else 75)
        print(
            f"{name}: ended after step {step or 'the last'}: code {code}",
            file=sys.stderr,
            flush=True,
        )
        if code != wanted:
            raise Finding(f"{name}: exit code {code} where {wanted} is right; see {log.name}")
        if step is not None:
            done[sent.name] += 1
    return done


def _python_path(environment: Mapping[str, str]) -> list[str]:
    return [part for part in [environment.get("PYTHONPATH", "")] if part]


def read(file: Path) -> list[dict[str, Any]]:
    """Read the objects of a file that has one a line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def computed(run: Path) -> list[dict[str, Any]]:
    """Read a run's records without what depends on the clock."""
    return [
        {name: value for name, value in record.items() if name not in CLOCK}
        for record in read(run / "metrics.jsonl")
    ]


def markdown(evaluations: Sequence[dict[str, Any]]) -> str:
    """Return the table of the evaluations."""
    head = ["updates", "loss, nats a token", "bits per byte", "perplexity"]
    rows = []
    for each in evaluations:
        row = [f"{each['step']:,}", f"{each['loss']:.4f}", f"{each['bits_per_byte']:.4f}"]
        rows.append([*row, f"{each['perplexity']:.3f}"])
    return table(head, rows)


def plot(
    model: str, records: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]
) -> str:
    """Draw cross entropy of training, in the mean of each hundredth of it, and of held-out text."""
    width = max(len(records) // 100, 1)
    means = [
        (part[-1]["step"] + 1, sum(each["ce_loss"] for each in part) / len(part))
        for part in (records[i : i + width] for i in range(0, len(records), width))
    ]
    held_out = [(each["step"], each["loss"]) for each in evaluations]
    curves = {"training": means, "held-out text": held_out}
    return lines(f"{model}: cross entropy (nats a token) by update", curves)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
