"""Define commands to watch, and watch them.

Most commands only write files as XLA does, into the folder that XLA_FLAGS names: a whole text, half
of one, the same name twice. Under `-S` Python runs no sitecustomize and sees XLA_FLAGS as C does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "lowering" / "fixtures"
MOE, GATHERED = FIXTURES / "cpu_moe.txt", FIXTURES / "cpu_gathered.txt"
MESH = ("--mesh", "data=1,fsdp=1,expert=8")
WATCH = (sys.executable, "-m", "moe_shard", "watch")
PLAIN = (sys.executable, "-S", "-c")

# Names that a command can use: FOLDER, write(name, text), compiled(fixture, name).
WRITER = """
import os, pathlib, re, signal, sys, time
FOLDER = pathlib.Path(re.search("--xla_dump_to=([^ ]*)", os.environ["XLA_FLAGS"])[1])
def write(name, text, mode="w"):
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / name, mode) as file:
        file.write(text)
def compiled(path, name="module_0001.jit_step"):
    write(name + ".cpu_after_optimizations.txt", open(path).read())
def say(text):
    print(text, flush=True)
"""
ONE_DEVICE = """HloModule jit_add

ENTRY %main (p: f32[2]) -> f32[2] {
  ROOT %p = f32[2]{0} parameter(0)
}
"""


def environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    return {**kept, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), **more}


@contextmanager
def started(
    folder: Path, *arguments: str, command: Sequence[str] = WATCH, **more: str
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(folder, **more),
        start_new_session=True,
    )
    # If the output never comes, the test fails instead of waiting forever.
    too_long = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL))
    too_long.start()
    try:
        yield process
    finally:
        too_long.cancel()
        process.kill()
        process.communicate()
    assert list(folder.iterdir()) == [], "the folder is gone, however the command ends"


def watch(folder: Path, *arguments: str, stdin: str = "", **more: str) -> tuple[int, str, str]:
    with started(folder, *arguments, **more) as process:
        out, err = process.communicate(stdin, timeout=60)
        return process.returncode, out, err


def read_until(process: subprocess.Popen[str], wanted: str) -> str:
    """Read standard error up to a line with the wanted words."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if wanted in line:
            return "".join(lines)
    raise AssertionError(f"no {wanted!r} in {lines}")
