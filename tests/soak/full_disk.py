"""Let a training fill its disk at many sizes, make room, and compare it with one that never did.

    python -m tests.soak.full_disk [--sizes 12] [--seed 0]

A disk is a tmpfs of a given size, which needs root or `unshare`. For each size, with checkpoints
written while steps wait and in the background, the command `moe_shard.train` runs into the wall:
what was not saved has to be said in two lines before the next step has ended, and every checkpoint
that is there has to be whole. Then there is room, and the same command has to end with exit code 0
and the metrics of a run that had room, bit for bit, each step once. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.soak.runs import COMPUTED, ROOT, TINY, records

STEPS, PERIOD = 12, 2
KEYS = (
    *TINY,
    *(f"steps={STEPS}", f"checkpoint_period={PERIOD}", "log_period=1", "run_name=full"),
    *("max_num_checkpoints_to_keep=2", "base_mlp_dim=256", "base_moe_mlp_dim=256"),
    *("eval_interval=3", "eval_holdout_fraction=0.05", "eval_steps=1"),
    # A step takes longer than a write, so that "before the next step ends" can be seen.
    *("max_target_length=1024", "per_device_batch_size=2"),
)
EVERY_STEP = "import moe_shard.terminal\nmoe_shard.terminal.PLAIN_SECONDS = 0.0\n"
"""As `sitecustomize.py`: a line of progress for each step, however short it is."""
PAGE = 4096
_STEP = re.compile(r"^step (\d+)/")
_NOT_SAVED = re.compile(r"^the checkpoint after step (\d+) was not saved")


@dataclass
class Row:
    """Hold what a run on a full disk did.

    Attributes:
        size: bytes of the disk.
        background: whether checkpoints were written in the background.
        code: exit code of the first start.
        not_saved: checkpoints that it said were not saved.
        late: most steps that ended between such a save and the line on it.
        held: files that it said it could not write.
        whole: checkpoints that were there and whole.
        wrong: what should not have happened.
    """

    size: int
    background: bool
    code: int = 0
    not_saved: list[int] = field(default_factory=list)
    late: int = 0
    held: list[str] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return the row of the table."""
        cells = [
            f"{self.size / 1024:,.0f} KiB",
            "background" if self.background else "waiting",
            str(self.code),
            ", ".join(map(str, self.not_saved)) or "none",
            ", ".join(self.held) or "none",
            ", ".join(map(str, self.whole)) or "none",
            "; ".join(self.wrong) or "all equal",
        ]
        return f"| {' | '.join(cells)} |"


HEADER = (
    "| disk | checkpoints | exit code | not saved, after step | files held | whole, after step "
    "| then, with room |\n|---|---|---|---|---|---|---|"
)


def train(folder: Path, outputs: Path, *keys: str, limit: str = "") -> tuple[int, str]:
    """Run the training; return its exit code and all that it printed."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{folder}:{ROOT}", "PYTHONUNBUFFERED": "1"}
    env |= {"XDG_CACHE_HOME": str(folder / "cache")}
    (folder / "sitecustomize.py").write_text(EVERY_STEP)
    command = [sys.executable, "-m", "moe_shard.train", *KEYS]
    command += [f"base_output_directory={outputs}", *keys]
    done = subprocess.run(
        ["bash", "-c", f'{limit} exec "$@"', "bash", *command],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout


def read_output(row: Row, output: str) -> None:
    """Read from the output what was said, how late, and in how many lines."""
    lines, now = output.splitlines(), 0
    for at, line in enumerate(lines):
        if found := _STEP.match(line):
            now = int(found[1])
        elif found := _NOT_SAVED.match(line):
            row.not_saved.append(int(found[1]))
            row.late = max(row.late, now - int(found[1]))
            if not lines[at + 1].startswith("fix: "):
                row.wrong.append("no fix in the second line")
        elif line.startswith("cannot write "):
            row.held.append(Path(line.split(": ")[0].removeprefix("cannot write ")).name)
    row.not_saved = sorted(set(row.not_saved))
    row.held = ["tensorboard" if name.startswith("events") else name for name in row.held]
    if "Traceback" in output or "Exception ignored" in output:
        row.wrong.append("a traceback")


def whole_checkpoints(run: Path) -> tuple[list[int], list[str]]:
    """Return which checkpoints have all files as their checksums say, and which have not."""
    whole: list[int] = []
    broken: list[str] = []
    for path in (run / "checkpoints").glob("*"):
        if not path.name.isdecimal():
            continue
        try:
            named = json.loads((path / "checksums.json").read_bytes())["files"]
            found = {name: [(path / name).stat().st_size, _sha256(path / name)] for name in named}
        except (OSError, ValueError, KeyError) as error:
            broken.append(f"{path.name}: {error}")
            continue
        if found == named:
            whole.append(int(path.name))
        else:
            broken.append(path.name)
    return sorted(whole), broken


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def computed(run: Path) -> list[list[Any]]:
    """Return the metrics of each step that do not depend on the clock."""
    return [[each[name] for name in ("step", *COMPUTED)] for each in records(run)]


def steps_of_files(run: Path) -> dict[str, list[Any]]:
    """Return the steps in each of a run's files of records."""
    return {
        path.name: [json.loads(line)["step"] for line in path.read_bytes().splitlines()]
        for path in sorted(run.glob("*.jsonl"))
    }


def evaluated(run: Path) -> list[Any]:
    """Return the evaluations of a run; none where it made none."""
    if not (run / "eval.jsonl").exists():
        return []
    return [json.loads(line) for line in (run / "eval.jsonl").read_bytes().splitlines()]


def compare(
    row: Row, run: Path, alone: Path, code: int, output: str, *, steps: int = STEPS
) -> None:
    """Compare a run that had room in the end with one that always had."""
    if code:
        row.wrong.append(f"exit code {code} with room: {output[-300:]!r}")
    elif computed(run) != computed(alone):
        row.wrong.append("other metrics")
    elif steps_of_files(run) != steps_of_files(alone):
        row.wrong.append("other steps in its files")
    elif evaluated(run) != evaluated(alone):
        row.wrong.append("other evaluations")
    whole, broken = whole_checkpoints(run)
    if broken or steps not in whole:
        row.wrong.append(f"checkpoints {whole}, broken {broken}")


@contextmanager
def disk(at: Path, size: int) -> Iterator[Path]:
    """Mount a disk of a size in bytes while the block runs."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


def one_size(folder: Path, alone: Path, size: int, *, background: bool) -> Row:
    """Run into the wall of one size, make room, and run again."""
    row = Row(size, background)
    mode = f"async_checkpointing={str(background).lower()}"
    with disk(folder / "disk", size) as outputs:
        row.code, output = train(folder, outputs, mode)
        read_output(row, output)
        if row.code not in (0, 1, 2):
            row.wrong.append(f"exit code {row.code}: {output[-300:]!r}")
        if row.late > 1:
            row.wrong.append(f"said {row.late} steps late")
        row.whole, broken = whole_checkpoints(outputs / "full")
        row.wrong += [f"broken: {each}" for each in broken]
        if row.code == 0 and STEPS not in row.whole:
            row.wrong.append("exit code 0 without the last checkpoint")
        subprocess.run(["mount", "-o", f"remount,size={256 << 20}", outputs], check=True)
        code, output = train(folder, outputs, mode)
        compare(row, outputs / "full", alone, code, output)
    return row


def sizes(run: Path, count: int) -> list[int]:
    """Choose sizes at which a run meets the wall, from those of one that had room."""
    checkpoint = max(_pages(path) for path in (run / "checkpoints").iterdir())
    at_first = sum(_pages(run / name) for name in ("config.yml", "lowering.json"))
    recorded = sum(_pages(path) for path in run.glob("*.jsonl")) + _pages(run / "tensorboard")
    found = [
        PAGE,
        at_first // 2,
        *(at_first + extra * PAGE for extra in (1, 3, 6)),
        at_first + recorded + 8 * PAGE,
        *(
            int(at_first + recorded + part * checkpoint)
            for part in (0.5, 0.98, 1.3, 2.02, 2.5, 3.1)
        ),
    ]
    return [size // PAGE * PAGE for size in found][:count]


def _pages(path: Path) -> int:
    """Return the bytes of a file or a folder on a disk of pages."""
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    return sum(-(-each.stat().st_size // PAGE) * PAGE for each in files)


def main(argv: Sequence[str]) -> int:
    """Run the command line; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description="Let a training fill its disk.")
    parser.add_argument("--sizes", type=int, default=12, help="how many, from the smallest")
    args = parser.parse_args(argv)
    if os.geteuid():
        command = [sys.executable, "-m", "tests.soak.full_disk", *argv]
        os.execvp("unshare", ["unshare", "-rm", *command])
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, output = train(folder, folder / "alone")
        if code:
            sys.exit(output)
        alone = folder / "alone" / "full"
        print(HEADER)
        for size in sizes(alone, args.sizes):
            for background in (False, True):
                rows.append(one_size(folder, alone, size, background=background))
                print(rows[-1].line(), flush=True)
    wrong = sum(map(bool, (row.wrong for row in rows)))
    late = max(row.late for row in rows)
    print(f"\n{len(rows)} runs, {wrong} wrong; said at most {late} steps after the save was due")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
