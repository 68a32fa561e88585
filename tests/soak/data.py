"""Train on large datasets, and compare each batch with that of a run that is killed on the way.

    python -m tests.soak.data [--megabytes 2000] [--files 1000] [--steps 100] [--kills 3]
                              [--processes 1 2] [--folder FOLDER]

The demo model, `mixtral-tiny`, is trained on a .jsonl.gz of so many megabytes, on a folder of so
many Parquet files, and on a mixture of three datasets by weights, on the caches of a user who has
none. For each:

- The first start of the .jsonl.gz is killed while it reads; what it left has to be gone after the
  next. One that is left alone then says, in its own `goodput.json`, how much of the time of steps
  waited for data, once twenty of them were made. Its memory is the largest that the kernel counted
  for the process, beyond that of the same run on the default text.
- By one process and by two, a smaller model is killed at random steps and started again. Each
  sequence that any start gave to a step has to be that of the run left alone.
- Each token of the run left alone has to be what the document that it says it is from holds, and
  no byte may be read twice (`tests.soak.datasets`, which shares no code with the package).

Prints a Markdown table. At full size it takes half an hour on two quiet cores, and 15 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from tests.quick import FLAGS
from tests.soak.datasets import find_parts, overlaps, write_json_lines, write_parquet
from tests.soak.recorded_batches import FOLDER, read_recorded
from tests.soak.runs import GONE_S, TINY, Start, records, start, wait

SEQ_LEN, SEQUENCES = 128, 32
RECORDED = "tests.soak.recorded_batches"
DEMO = (RECORDED, "mixtral-tiny", "log_period=50")
SMALL = (RECORDED, *TINY, f"max_target_length={SEQ_LEN}", f"per_device_batch_size={SEQUENCES // 4}")
"""A model of which a kill costs seconds; its batches are the demo model's."""
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
MOST_WAITING, MOST_MEMORY = 0.01, 1e9
WAITS = "it waits for data"
_WARM_STEPS = 20
_PARQUET_ROWS = 400
_START_S = 3600.0


@dataclass
class Figures:
    """Hold what one start did.

    Attributes:
        first_step_s: seconds until its first step was recorded.
        peak: most bytes of memory of one of its processes.
        waiting: share of the time of steps in which it waited for data, after the first ones.
    """

    first_step_s: float = float("nan")
    peak: int = 0
    waiting: float = float("nan")


@dataclass
class Row:
    """Hold what the runs on one dataset did; see the module.

    Attributes:
        title: what the dataset is.
        name: of its runs.
        text: documents and megabytes that a run said it read.
        first: the first start, left alone.
        again: seconds until the first step of later starts.
        beyond: bytes of memory beyond those of the default text's run.
        compared: {processes: sequences that were equal}.
        kills: {processes: kills}.
        wrong: what should not have happened.
    """

    title: str
    name: str
    text: str = ""
    first: Figures = field(default_factory=Figures)
    again: list[float] = field(default_factory=list)
    beyond: int = 0
    compared: Counter[int] = field(default_factory=Counter)
    kills: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return the row of the table."""
        equal = ", ".join(
            f"{self.compared[count]:,} by {count} ({self.kills[count]} kills)"
            for count in sorted(self.compared)
        )
        cells = [
            self.title,
            self.text,
            f"{self.first.first_step_s:.0f} s",
            f"{max(self.again, default=float('nan')):.0f} s",
            f"{100 * self.first.waiting:.3f} %",
            f"{self.beyond / 1e6:,.0f} MB",
            equal or "none",
            "; ".join(self.wrong) or "none",
        ]
        return f"| {' | '.join(cells)} |"


HEADER = (
    "| dataset | text | step 1 of the first start after | of later ones | waits for data "
    "| memory beyond the default text's | sequences equal, by processes | wrong |\n"
    "|---|---|---|---|---|---|---|---|"
)


class Soak:
    """Run the datasets of a folder.

    Args:
        folder: where datasets are made and runs write.
        steps: steps of a run that is left alone.
        seed: decides where runs are killed.
        demo: the program of the runs that are left alone.
    """

    def __init__(self, folder: Path, *, steps: int, seed: int, demo: Sequence[str] = DEMO) -> None:
        self.folder, self.steps, self.demo = folder, steps, demo
        self.rng = random.Random(seed)
        self.cache = folder / "cache"
        self.default = Figures()
        self.output = ""

    def start(
        self, name: str, count: int, *arguments: str, program: Sequence[str] = SMALL
    ) -> Start:
        """Start a run."""
        own = (f"run_name={name}", f"jax_cache_dir={self.folder}/jax", *arguments)
        recorded = {FOLDER: str(self.folder / "recorded" / name)}
        quick = {"XLA_FLAGS": FLAGS} if program == SMALL else {}
        variables = [{"XDG_CACHE_HOME": str(self.cache)} | recorded | quick] * count
        return start(self.folder, count, own, program=program, own=variables)

    def run_of(self, name: str) -> Path:
        """Return the folder of a run."""
        return self.folder / "outputs" / name

    def finish(
        self, name: str, count: int, *arguments: str, program: Sequence[str] = SMALL
    ) -> tuple[Figures, str]:
        """Run to the end; return the figures, and what is wrong."""
        started = self.start(name, count, *arguments, program=program)
        figures = watch(started, self.run_of(name), lambda: False)
        self.output = started.texts()[0]
        codes = [process.wait() for process in started.processes]
        return figures, f"{name} ended with {codes}: {self.output[-600:]}" if any(codes) else ""

    def run_default(self) -> str:
        """Run on the default text, once its step is compiled; return what is wrong."""
        # A compiler takes more memory than what it made, which the other runs find in the cache.
        # The program of another number of steps is another one.
        steps = f"steps={self.steps}"
        started = self.start("compiled", 1, steps, program=self.demo)
        watch(started, self.run_of("compiled"), partial(_reached, self.run_of("compiled"), 1))
        started.processes[0].kill()
        wait(started, GONE_S)
        if not _reached(self.run_of("compiled"), 1):
            return f"it made no step: {started.texts()[0][-600:]}"
        self.default, wrong = self.finish("default", 1, steps, program=self.demo)
        return wrong

    def kill_while_reading(self, row: Row, *arguments: str) -> None:
        """Kill a start while it reads a dataset for the first time."""
        started = self.start(f"{row.name}-reading", 1, "steps=1", *arguments)

        def reads() -> bool:
            texts = self.cache.glob("moe_shard/text/.*/text")
            return any(each.stat().st_size > 1 << 20 for each in texts)

        watch(started, self.run_of("none"), reads)
        if not reads():
            row.wrong.append("it was not killed while it read")
        started.processes[0].kill()
        wait(started, GONE_S)

    def run_dataset(
        self, row: Row, arguments: Sequence[str], counts: Sequence[int], kills: int
    ) -> None:
        """Run on one dataset, left alone and killed; the row receives the figures."""
        row.first, wrong = self.finish(
            row.name, 1, f"steps={self.steps}", *arguments, program=self.demo
        )
        row.wrong += [wrong] if wrong else []
        read = re.findall(r"text: ([\d,]+) documents in .*?, ([\d,.]+) MB: ", self.output)
        sums = [sum(float(each.replace(",", "")) for each in of) for of in zip(*read, strict=True)]
        row.text = "{:,.0f} documents, {:,.0f} MB".format(*sums) if sums else "none"
        row.beyond = row.first.peak - self.default.peak
        left = [path for path in self.cache.glob("moe_shard/text/.*") if path.is_dir()]
        row.wrong += [f"left in the cache: {path.name}" for path in left]
        if not row.first.waiting <= MOST_WAITING:  # also where it is not known
            row.wrong.append(WAITS)
        if row.beyond > MOST_MEMORY:
            row.wrong.append("it takes too much memory")
        alone = in_order(read_recorded(self.folder / "recorded" / row.name, SEQ_LEN), row.wrong)
        if len(alone) != self.steps * SEQUENCES:
            row.wrong.append(f"{len(alone):,} sequences in {self.steps} steps")
        check_content(alone, row)
        for count in counts:
            self.run_killed(row, count, kills, arguments, alone)

    def run_killed(
        self,
        row: Row,
        count: int,
        kills: int,
        arguments: Sequence[str],
        alone: Int32[np.ndarray, "n width"],
    ) -> None:
        """Kill a run at random steps, and compare what all of its starts read."""
        steps = min(self.steps, 20 * (kills + 1))
        name = f"{row.name}-{count}"
        run = self.run_of(name)
        for kill in range(kills):
            until = self.rng.randint(20 * kill + 1, 20 * kill + 18)
            started = self.start(name, count, f"steps={steps}", *arguments)
            figures = watch(started, run, partial(_reached, run, until))
            row.again.append(figures.first_step_s)
            victim = self.rng.randrange(count)
            row.kills[count] += started.running()
            started.processes[victim].send_signal(signal.SIGKILL)
            if wait(started, GONE_S) > GONE_S:
                row.wrong.append(f"{name}: not gone within {GONE_S:.0f} s of a kill")
        figures, wrong = self.finish(name, count, f"steps={steps}", *arguments)
        row.again.append(figures.first_step_s)
        row.wrong += [wrong] if wrong else []
        if row.kills[count] != kills:
            row.wrong.append(f"{name}: killed {row.kills[count]} times of {kills}")
        found = in_order(read_recorded(self.folder / "recorded" / name, SEQ_LEN), row.wrong)
        row.compared[count] = len(found)
        if not np.array_equal(found, alone[: steps * SEQUENCES]):
            row.wrong.append(f"{name}: other batches than alone")


def done(run: Path) -> int:
    """Return the number of the last step that a run has recorded; 0 if there is none."""
    return max((each["step"] for each in records(run)), default=0)


def _reached(run: Path, step: int) -> bool:
    return done(run) >= step


def watch(started: Start, run: Path, enough: Callable[[], bool]) -> Figures:
    """Watch a start until it ends, or it is enough; return its figures."""
    began, figures = time.monotonic(), Figures()
    made = done(run)
    warm: dict[str, Any] | None = None
    while started.running() and not enough():
        if time.monotonic() - began > _START_S:
            break
        figures.peak = max(figures.peak, *(peak_memory(each.pid) for each in started.processes))
        if np.isnan(figures.first_step_s) and done(run) > made:
            figures.first_step_s = time.monotonic() - began
        warm = warm or _last_start(run, made + _WARM_STEPS)
        time.sleep(0.02)
    last = _last_start(run, made + _WARM_STEPS)
    if warm and last and last["ended"] > warm["ended"]:
        spent = {
            part: last["seconds"].get(part, 0.0) - warm["seconds"].get(part, 0.0)
            for part in ("data", "steps")
        }
        figures.waiting = spent["data"] / sum(spent.values())
    return figures


def _last_start(run: Path, updates: int) -> dict[str, Any] | None:
    """Read where the time of a run's last start went; None before so many updates."""
    try:
        last: dict[str, Any] = json.loads((run / "goodput.json").read_bytes())["starts"][-1]
    except OSError:
        return None
    return last if last["updates"] >= updates else None


def peak_memory(pid: int) -> int:
    """Return the most bytes that a process has had in memory; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")
    )


def in_order(found: Int32[np.ndarray, "n width"], wrong: list[str]) -> Int32[np.ndarray, "n width"]:
    """Put sequences in order, each once; note if one was read again and was another."""
    once = np.unique(found, axis=0)
    again = (once[1:, :2] == once[:-1, :2]).all(axis=1).sum()
    if again:
        wrong.append(f"{again:,} sequences were others when they were read again")
    return once


def check_content(found: Int32[np.ndarray, "n width"], row: Row) -> None:
    """Compare tokens with the documents they are from; note what is wrong."""
    parts, letters = [], Counter[str]()
    for sequence in found[:, 2:]:
        inputs, targets = np.split(sequence, 2)
        if (inputs[1:] != targets[:-1]).any():
            row.wrong.append("targets are not one ahead")
            return
        try:
            here = find_parts(inputs)
        except ValueError as error:
            row.wrong.append(str(error))
            return
        letters.update({part.letter for part in here})
        parts += here
    read = sum(part.end - part.start for part in parts)
    if read < 0.8 * found[:, 2 : 2 + SEQ_LEN].size:
        row.wrong.append(f"only {read:,} tokens say where they are from")
    if twice := overlaps(parts):
        row.wrong.append(f"{twice:,} parts were read twice")
    total = sum(letters.values())
    for letter, share in WEIGHTS.items():
        if len(letters) > 1 and abs(letters[letter] / total - share) > 0.01:
            row.wrong.append(f"{letters[letter] / total:.3f} of sequences are from {letter}")


def make_datasets(folder: Path, megabytes: int, files: int) -> dict[str, tuple[str, ...]]:
    """Write the datasets that are not there yet; return the arguments that read each."""
    small = max(1, megabytes // 100)
    a, b, c = folder / "a.jsonl.gz", folder / "b", folder / "c.jsonl.gz"
    for path, letter, size in ((a, "a", megabytes), (c, "c", small)):
        if not path.exists():
            write_json_lines(path, letter, size * 10**6)
    if not b.exists():
        write_parquet(b, "b", files, _PARQUET_ROWS)
    weights = ", ".join(map(str, WEIGHTS.values()))
    return {
        f"{megabytes:,} MB of .jsonl.gz": (f"dataset_path={a}",),
        f"{files:,} Parquet files": (f"dataset_path={b}",),
        "mixture of three": (
            f"dataset_path=[{a}, {b}, {c}]",
            f"dataset_weights=[{weights}]",
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description="Train on large datasets, killed and alone.")
    parser.add_argument("--megabytes", type=int, default=2000, help="of the .jsonl.gz")
    parser.add_argument("--files", type=int, default=1000, help="of Parquet")
    parser.add_argument("--steps", type=int, default=100, help="of a run that is left alone")
    parser.add_argument("--kills", type=int, default=3, help="for each dataset and process count")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where datasets stay; otherwise they do not")
    args = parser.parse_args(argv)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        made = args.folder or Path(name)
        began = time.monotonic()
        datasets = make_datasets(made, args.megabytes, args.files)
        print(f"datasets made in {time.monotonic() - began:.0f} s", flush=True)
        soak = Soak(Path(name), steps=args.steps, seed=args.seed)
        if wrong := soak.run_default():
            print(wrong)
            return 1
        memory = f"{soak.default.peak / 1e6:,.0f} MB of memory"
        print(f"a run on the default text: {memory}\n\n{HEADER}", flush=True)
        for number, (title, arguments) in enumerate(datasets.items()):
            rows.append(Row(title, f"dataset-{number}"))
            if number == 0:
                soak.kill_while_reading(rows[-1], *arguments)
            soak.run_dataset(rows[-1], arguments, args.processes, args.kills)
            print(rows[-1].line(), flush=True)
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
