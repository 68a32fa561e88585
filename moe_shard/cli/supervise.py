"""Run a training command again as long as it ends early and makes progress.

    moe-shard supervise [--max-restarts N] -- train MODEL [key=value ...]

For machines without a scheduler that does so. Of several processes each is supervised on its own
host: they end together, and wait for each other at the next start.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from moe_shard.checkpoints.run_files import checkpoint_names
from moe_shard.errors import EXIT_STOPPED, CommandParser, UserError

MAX_RESTARTS = 3
_LONGEST_DELAY_S = 60.0
_END_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, kept by what follows
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Run a command that gets SIGTERM when its supervisor is killed."""


def main(argv: Sequence[str], prog: str = "moe-shard supervise") -> int:
    """Run the command line.

    Args:
        argv: options, then the command.
        prog: the command's name in --help.

    Returns:
        The exit code of the last start; 128 and the signal's number if a signal ended it.

    Raises:
        UserError: bad usage.
    """
    parser = CommandParser(
        prog=prog,
        description="Run a training command, and run it again when it stopped early (exit code "
        "75) or was killed by a signal, as long as it makes progress. Other exit codes end it: "
        "the same would happen again.",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=MAX_RESTARTS,
        metavar="N",
        help="restarts in a row without a new step or checkpoint (default %(default)s)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- train MODEL [key=value ...]")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.max_restarts < 0:
        raise UserError(f"--max-restarts {args.max_restarts} is negative\nfix: 0 or more")
    if command[:1] != ["train"] or len(command) < 2:
        shown = " ".join(command) or "nothing"
        raise UserError(
            f"cannot supervise {shown!r}: it is no training\n"
            f"usage: {prog} [--max-restarts N] -- train MODEL [key=value ...]"
        )
    if {"-h", "--help"} & set(command):
        return subprocess.run([sys.executable, "-m", "moe_shard", *command], check=False).returncode
    folder = _run_folder(command[1:])
    return _Supervisor([sys.executable, "-m", "moe_shard", *command], folder, args.max_restarts)()


class _Supervisor:
    """Start a command until it is done, or no longer makes progress."""

    def __init__(self, command: list[str], folder: Path, max_restarts: int) -> None:
        self._command, self._folder, self._max_restarts = command, folder, max_restarts
        self._child: subprocess.Popen[bytes] | None = None
        self._asked: list[int] = []  # signals

    def __call__(self) -> int:
        previous = {
            number: signal.signal(number, self._pass_on)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            return self._run()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        best, in_vain = progress(self._folder), 0
        while True:
            code = self._start()
            reached = progress(self._folder)
            in_vain = 0 if reached > best else in_vain + 1
            best = max(best, reached)
            ended = 128 - code if code < 0 else code
            if self._asked or not (code == EXIT_STOPPED or ended > 128) or ended == 130:
                return ended
            if in_vain > self._max_restarts:
                _say(
                    f"exit code {ended}; {self._max_restarts} restarts made no progress, at {best}"
                )
                return ended
            delay = 0.0 if in_vain == 0 else min(2.0 ** (in_vain - 1), _LONGEST_DELAY_S)
            vain = (
                f", restart {in_vain} of {self._max_restarts} without progress" if in_vain else ""
            )
            _say(f"exit code {ended} at update {best}{vain}; the same command again")
            until = time.monotonic() + delay
            while time.monotonic() < until and not self._asked:
                time.sleep(0.1)
            if self._asked:
                return ended

    def _start(self) -> int:
        # A session of its own: the terminal's Ctrl-C reaches the command once, from here.
        self._child = subprocess.Popen(
            [sys.executable, "-c", _END_WITH_PARENT, *self._command], start_new_session=True
        )
        if self._asked:  # a signal while it was started
            self._child.send_signal(self._asked[-1])
        return self._child.wait()

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self._asked.append(number)
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def progress(folder: Path) -> int:
    """Return the updates that a run has made: its newest checkpoint's, or its last record's.

    Args:
        folder: folder of the run, which need not exist.
    """
    names = checkpoint_names(folder)
    made = max((int(name) for name in names if name.isdecimal()), default=0)
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - 65_536, 0))
            lines = file.read().splitlines()
    except OSError:
        return made
    for line in lines:
        try:
            made = max(made, int(json.loads(line)["step"]) + 1)
        except (ValueError, TypeError, KeyError):
            continue  # cut off by a kill
    return made


def _run_folder(arguments: Sequence[str]) -> Path:
    """Return the folder of the run that a training command makes.

    Raises:
        UserError: the command's model or keys are wrong.
    """
    from moe_shard.checkpoints.resolve import load_model
    from moe_shard.training.run_folder import run_path

    return run_path(load_model(arguments[0], list(arguments[1:])).run)


def _say(line: str) -> None:
    print(f"supervise: {line}", file=sys.stderr, flush=True)
