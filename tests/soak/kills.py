"""Kill a training again and again, and compare it bit for bit with one that was left alone.

    python -m tests.soak.kills [--kills 100] [--processes 1 2] [--seeds 0 1 2 3] [--keep FOLDER]
    python -m tests.soak.kills --local [--kills 50] [--seeds 0 1]

A kill is one of SIGKILL, SIGTERM and SIGINT, to one of the processes, at a random moment of a
start: while it starts or compiles, restores, steps, saves or ends. After each, all processes have
to be gone within a minute, with the codes of the contract, without a traceback or a C++ stack, and
the next start goes on. Then the run is finished three times, from copies of its folder:

- by the same processes on the same mesh: all seven metrics equal those of a run that was left
  alone, bit for bit;
- on another mesh, and by another number of processes: sums are taken in another order there, so
  metrics differ by float32's rounding, the more the longer the two train apart. How much that is,
  two runs tell that were left alone, one here and one there: in its first 40 steps a copy may
  differ from the run left alone by twice as much as they do up to there, and by 1e-3 at most.

With --local two processes, replicas of each other, save to disks of their own as well
(`enable_emergency_checkpoint`), and one in five kills loses the folder of one of them.

With --keep the figures of each seed are kept in a folder: what is done is not done again, and the
table is of all of them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.quick import FLAGS
from tests.soak.runs import (
    COMPUTED,
    GONE_S,
    MOMENTS,
    NOISE,
    SIGNALS,
    Start,
    checkpoints,
    computed,
    reach,
    records,
    start,
    wait,
)

OTHER_MESH = ("ici_data_parallelism=1", "ici_expert_parallelism=2", "ici_fsdp_parallelism=2")
REPLICAS = ("ici_data_parallelism=2", "ici_expert_parallelism=2")
LOCAL = (
    *("enable_emergency_checkpoint=true", "local_checkpoint_directory=disks"),
    "local_checkpoint_period=4",
)
OWN_DISKS = "is read from the machines' own disks"
STEPS_A_KILL = 25
_MOST, _STEPS_APART = 1e-3, 40
_CODES = {0, 75}


class Soak:
    """Kill one run, finish it in three ways, and keep the figures.

    Args:
        folder: where it runs.
        count: number of processes.
        kills: how often they are killed.
        seed: decides which, by what, and when.
        local: whether the processes save to disks of their own as well.
    """

    def __init__(
        self, folder: Path, count: int, kills: int, seed: int, *, local: bool = False
    ) -> None:
        self.folder, self.count, self.kills, self.local = folder, count, kills, local
        self.rng = random.Random(f"{seed} {count}")
        self.steps = kills * STEPS_A_KILL + 40
        self.wrong: list[str] = []
        self.figures: Counter[str] = Counter()
        self.longest = 0.0
        self.differences: dict[str, tuple[float, float]] = {}

    def run(self) -> dict[str, Any]:
        """Run it; return the figures."""
        began = time.monotonic()
        done = sum(self._kill(number) for number in range(self.kills))
        killing = time.monotonic() - began
        if done < self.kills:
            self.wrong.append(f"{done} kills of {self.kills}: the run was too short for more")
        self.until = max(checkpoints(self._path("killed")), default=0) + _STEPS_APART
        for name in ("elsewhere", "otherwise"):
            shutil.copytree(self._path("killed"), self._path(name))
        other = 3 - self.count
        self._finish("killed", self.count)
        self._finish("alone", self.count)
        self._same("killed", "alone")
        for name, count, mesh in (("elsewhere", self.count, OTHER_MESH), ("otherwise", other, ())):
            self._finish(name, count, *mesh)
            self._finish(f"{name}-alone", count, *mesh)
            self._near(name)
        return {
            "processes": self.count,
            "kills": done,
            "figures": dict(self.figures),
            "longest": self.longest,
            "seconds_a_kill": killing / max(done, 1),
            "steps": self.steps,
            "differences": self.differences,
            "wrong": self.wrong,
        }

    def _path(self, name: str) -> Path:
        return self.folder / "outputs" / name

    def _start(self, name: str, count: int, *mesh: str) -> Start:
        return start(self.folder, count, self.arguments(name, *mesh), XLA_FLAGS=FLAGS)

    def arguments(self, name: str, *mesh: str) -> tuple[str, ...]:
        """Return the arguments of a run; only the one that is killed has disks of its own."""
        own = f"steps={self.steps}", f"run_name={name}", f"jax_cache_dir={self.folder}/jax"
        replicas = REPLICAS if self.local else ()
        return (*own, *replicas, *(LOCAL if self.local and name == "killed" else ()), *mesh)

    def _lose(self) -> None:
        """Lose the folder of one process's disk, now and then."""
        disks = sorted(self.folder.glob("disks/*/*"))
        if disks and self.rng.random() < 0.2:
            shutil.rmtree(self.rng.choice(disks))
            self.figures["lost disks"] += 1

    def _kill(self, number: int) -> bool:
        """Start the run and kill it; return whether it was killed."""
        run = self._path("killed")
        if len(records(run)) > self.steps - 20:
            return False
        started = self._start("killed", self.count)
        moment = self.rng.choice(MOMENTS)
        sent, victim = self.rng.choice(SIGNALS), self.rng.randrange(self.count)
        if moment == "start-up":
            time.sleep(self.rng.uniform(0.0, 3.0))
        else:
            reach(started, run, moment, victim)
            time.sleep(self.rng.choice((0.0, self.rng.uniform(0.0, 0.25))))
        started.processes[victim].send_signal(sent)
        took = wait(started, GONE_S)
        codes = [process.returncode for process in started.processes]
        self.figures[f"{sent.name} at {moment}"] += 1
        self.figures[OWN_DISKS] += OWN_DISKS in started.texts()[0]
        self._lose()
        self.longest = max(self.longest, took)
        allowed = _CODES | ({-signal.SIGKILL} if sent == signal.SIGKILL else set())
        if moment == "start-up":  # before Python has a handler, the system's default ends it
            allowed |= {-sent}
        noisy = [mark for mark in NOISE for text in started.texts() if mark in text]
        what = f"{number + 1}: {sent.name} to process {victim} at {moment}: {codes} {took:.1f} s"
        if took > GONE_S or not set(codes) <= allowed or noisy:
            tail = " | ".join(text[-600:] for text in started.texts())
            self.wrong.append(f"{self.count} processes, {what}: {tail}")
        print(f"{what}, {len(records(run))} steps", flush=True)
        return True

    def _finish(self, name: str, count: int, *mesh: str) -> None:
        started = self._start(name, count, *mesh)
        took = wait(started, 1200)
        if took > 1200 or any(process.returncode for process in started.processes):
            self.wrong.append(f"{name} did not finish: {started.texts()[0][-600:]}")

    def _same(self, name: str, other: str) -> None:
        found, wanted = (computed(self._path(each)) for each in (name, other))
        if found != wanted or len(found) != self.steps:
            self.wrong.append(f"{name} and {other} differ: {len(found)}, {len(wanted)} records")

    def _near(self, name: str) -> None:
        """Compare a copy that was finished in another way with the run left alone."""
        here, there, copy = (
            computed(self._path(each))[: self.until] for each in ("alone", f"{name}-alone", name)
        )
        rounding, found = largest_difference(there, here), largest_difference(copy, here)
        self.differences[name] = (found, rounding)
        if len(copy) != len(here) or found > min(2 * rounding, _MOST):
            self.wrong.append(
                f"{name}: {len(copy)} records, differs by {found:.1e}; rounding is {rounding:.1e}"
            )


def largest_difference(found: Sequence[Sequence[Any]], wanted: Sequence[Sequence[Any]]) -> float:
    """Return the largest difference of a metric, relative to its largest value over all steps."""
    worst = 0.0
    for column in range(1, len(COMPUTED) + 1):
        pairs = [(a[column], b[column]) for a, b in zip(found, wanted, strict=False)]
        largest = max((abs(b) for _, b in pairs), default=0.0)
        worst = max(worst, *(abs(a - b) / (largest or 1.0) for a, b in pairs))
    return worst


def table(done: Sequence[dict[str, Any]]) -> str:
    """Format the figures of several soaks as Markdown."""
    lines = [
        f"| processes | kills | {' | '.join(f'at {each}' for each in MOMENTS)} | gone after "
        "| same mesh and processes | another mesh | another number of processes | wrong |",
        f"|---|---|{'---|' * len(MOMENTS)}---|---|---|---|---|",
    ]
    for count in sorted({each["processes"] for each in done}):
        of = [each for each in done if each["processes"] == count]
        at: Counter[str] = Counter()
        for each in of:
            for what, times in each["figures"].items():
                at[what.rpartition(" at ")[2]] += times
        near = [
            " of ".join(f"{max(each['differences'][name][i] for each in of):.0e}" for i in (0, 1))
            for name in ("elsewhere", "otherwise")
        ]
        wrong = sum(len(each["wrong"]) for each in of)
        same = not any("differ:" in line for each in of for line in each["wrong"])
        lines.append(
            f"| {count} | {sum(each['kills'] for each in of)} | "
            f"{' | '.join(str(at[each]) for each in MOMENTS)} | "
            f"{max(each['longest'] for each in of):.1f} s | "
            f"{sum(each['steps'] for each in of)} steps {'equal' if same else 'NOT equal'} | "
            f"{near[0]} | {near[1]} | {wrong} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the command line; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description="Kill a training again and again.")
    parser.add_argument("--kills", type=int, default=100, help="over all seeds and processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--local", action="store_true", help="two processes with own disks")
    parser.add_argument("--keep", type=Path, help="folder of the figures")
    args = parser.parse_args()
    counts = [2] if args.local else args.processes
    parts = [(seed, count) for seed in args.seeds for count in counts]
    done: list[dict[str, Any]] = []
    for seed, count in parts:
        kept = args.keep / f"{seed}-{count}{'-local' * args.local}.json" if args.keep else None
        if kept and kept.exists():
            done.append(json.loads(kept.read_text()))
            continue
        with tempfile.TemporaryDirectory() as folder:
            figures = Soak(
                Path(folder), count, args.kills // len(parts), seed, local=args.local
            ).run()
        print(
            f"seed {seed}, {count} processes: {figures['kills']} kills, "
            f"{figures['seconds_a_kill']:.1f} s each, {len(figures['wrong'])} wrong",
            *(
                [
                    f"starts of {figures['figures'].get(OWN_DISKS, 0)} kills read from own disks, "
                    f"{figures['figures'].get('lost disks', 0)} were lost"
                ]
                if args.local
                else []
            ),
            *figures["wrong"],
            sep="\n",
            flush=True,
        )
        done.append(figures)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(figures))
    print(f"\n{table(done)}")
    return 1 if any(each["wrong"] for each in done) else 0


if __name__ == "__main__":
    sys.exit(main())
