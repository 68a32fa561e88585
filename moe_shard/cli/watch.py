"""Run any JAX program, and show what its steps lower to as soon as they have compiled.

    moe-shard watch -- python train.py --steps 100
    moe-shard watch --expect expert-parallel --stop -- python -m maxtext.trainers.pre_train.train

COMMAND runs as it would alone: its input, output, signals and exit code are its own. The tables go
to standard error, each as soon as XLA has compiled the program, which is before its first step
runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from io import StringIO
from typing import TYPE_CHECKING, Any

from moe_shard.errors import EXIT_FINDING, CommandParser, UserError
from moe_shard.lowering.sources import parse_expert_axes, parse_mesh, parse_stages
from moe_shard.lowering.verdict_names import VERDICTS
from moe_shard.watching.child import CannotStart, Child, end_as, hold_signals, interrupted
from moe_shard.watching.dumps import CACHE, Dumps

if TYPE_CHECKING:
    from moe_shard.watching.programs import Expectation, Programs, WatchedProgram

_EVERY_S = 0.05
_GRACE_S = 10.0
_PATIENCE_S = 2.0
_SIGTERM, _SIGKILL = 15, 9
_RULES = """\
A program is shown when it runs on several devices and its matrix products have at least 1 % of the
FLOPs of the largest so far; the others are counted at the end. With --expect every program shown
must have the verdict, and at least one must be shown; a program without experts is judged only if
it has a backward pass. The exit code is COMMAND's own if that is not 0, else 1 if the expectation
does not hold; 126 or 127 if COMMAND cannot be started. jax's persistent compilation cache is off
for COMMAND, because programs from it have no text before optimization."""


def main(argv: Sequence[str], prog: str = "moe-shard watch") -> int:
    """Start the command, read what it compiles, and end as it ends."""
    arguments, command = _arguments(argv, prog)
    mesh = parse_mesh(arguments.mesh) if arguments.mesh else None
    axes = parse_expert_axes(arguments.expert_axes, mesh)
    stages = parse_stages(arguments.stages) if arguments.stages else None
    # Only now: --help and bad usage are answered before the reader is loaded.
    from moe_shard.watching.programs import Expectation, Programs

    programs = Programs(mesh, axes, stages, everything=arguments.all)
    expectation = Expectation(arguments.expect) if arguments.expect else None
    mask = hold_signals()
    with Dumps() as dumps:
        environment = dumps.environment(os.environ, keep_cache=arguments.keep_cache)
        try:
            child = Child(command, environment, mask, stdout_to_stderr=arguments.json)
        except CannotStart as error:
            _say(f"error: {error}\n")
            return error.code
        reader = _Reader(dumps, programs, expectation, child if arguments.stop else None)
        code = child.wait()
        cut_short = reader.finish(_PATIENCE_S if child.interrupted else None)
        failure = expectation.failure(programs.shown) if expectation else None
        _say(_closing(programs, cut_short=cut_short, failure=failure))
    if arguments.json:
        print(json.dumps(_as_json(command, code, programs, failure), indent=2), flush=True)
    if reader.stopped:
        return EXIT_FINDING
    return end_as(code) or (EXIT_FINDING if failure else 0)


class _Reader:
    """Read programs as they are written, while the command runs.

    Args:
        dumps: where they are.
        programs: collects them.
        expectation: the verdict that they should have, if any.
        to_stop: the command to end when they do not.
    """

    def __init__(
        self,
        dumps: Dumps,
        programs: Programs,
        expectation: Expectation | None,
        to_stop: Child | None,
    ) -> None:
        self._dumps = dumps
        self._programs = programs
        self._expectation = expectation
        self._to_stop = to_stop
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._abandoned = False
        self.stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        """Read until the command has ended, then read what is left."""
        pause = _EVERY_S
        while not self._ended.wait(pause):
            began = time.thread_time()
            if not self._read(final=False):
                # A program's own folder may hold thousands of files: use at most 5 % of a core.
                pause = max(_EVERY_S, 20 * (time.thread_time() - began))
        self._read(final=True)

    def finish(self, patience: float | None) -> bool:
        """Read what is left, unless a signal asks to stop waiting.

        Args:
            patience: seconds to wait at most; None for no limit.

        Returns:
            Whether something was left unread.
        """
        self._ended.set()
        until = None if patience is None else time.monotonic() + patience
        while self._thread.is_alive():
            if interrupted(_EVERY_S) or (until is not None and time.monotonic() > until):
                self._abandoned = True
                return True
        return False

    def _read(self, *, final: bool) -> int:
        """Read what is new, and return how many programs that were."""
        count = 0
        try:
            for path in self._dumps.whole(final=final):
                if self._abandoned:
                    break
                count += 1
                program = self._programs.add(path)
                if program is not None:
                    self._show(program)
        except OSError as error:  # a full disk or a removed folder must not end the command
            self._programs.unread[str(error.filename)] = str(error.strerror)
        return count

    def _show(self, program: WatchedProgram) -> None:
        _say(_shown(program, time.monotonic() - self._since))
        if self._expectation and self._expectation.is_broken_by(program):
            self._stop()

    def _stop(self) -> None:
        if self._to_stop is None or self.stopped or self._ended.is_set():
            return
        self.stopped = True
        _say("watch: --stop: the expectation does not hold, ending the command\n")
        self._to_stop.send(_SIGTERM)
        killer = threading.Timer(_GRACE_S, self._to_stop.send, (_SIGKILL,))
        killer.daemon = True
        killer.start()


def _shown(program: WatchedProgram, seconds: float) -> str:
    from moe_shard.terminal import Console

    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    page = StringIO()
    # A pipe has no width: 80 columns would fold the table.
    width = os.get_terminal_size(2).columns if is_terminal else 120
    console = Console(file=page, force_terminal=is_terminal, width=width)
    console.print(f"watch: {program.name}, {seconds:.1f} s after the start", markup=False)
    program.report.render_table(console)
    return page.getvalue()


def _closing(programs: Programs, *, cut_short: bool, failure: str | None) -> str:
    count = len(programs.shown)
    lines = [f"{count} program{'s' * (count != 1)} shown"]
    if programs.passed_over:
        lines[0] += f"; {programs.passed_over} small or of one device were not (--all shows them)"
    if programs.repeated:
        lines[0] += f"; {programs.repeated} had the text of an earlier one"
    if not (count or programs.passed_over or programs.unread or cut_short):
        lines = [
            "no compiled program was seen: XLA compiled none, or only in a process without the "
            "XLA_FLAGS and PYTHONPATH that COMMAND was given"
        ]
    lines += [f"cannot read {name}: {why}" for name, why in programs.unread.items()]
    if cut_short:
        lines.append("interrupted: the last programs have not been read")
    if failure:
        lines.append(failure)
    return "".join(f"watch: {line}\n" for line in lines)


def _as_json(
    command: Sequence[str], code: int, programs: Programs, failure: str | None
) -> dict[str, Any]:
    return {
        "command": list(command),
        "exit_code": code if code >= 0 else 128 - code,
        "failure": failure,
        "programs": [program.to_json() for program in programs.shown],
        "not_shown": programs.passed_over,
        "repeated": programs.repeated,
        "unread": programs.unread,
    }


def _say(text: str) -> None:
    """Write to standard error at once; ignore a closed pipe."""
    if sys.stderr is not None:  # None where the caller has closed it
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()


def _arguments(argv: Sequence[str], prog: str) -> tuple[argparse.Namespace, list[str]]:
    parser = CommandParser(
        prog=prog,
        usage="%(prog)s [options] -- COMMAND ...",
        description="Run any JAX program, and show what its steps lower to.",
        epilog=_RULES,
    )
    parser.add_argument("--expect", choices=VERDICTS, help="exit with 1 on any other verdict")
    parser.add_argument(
        "--stop",
        action="store_true",
        help="end COMMAND as soon as --expect does not hold (SIGTERM, 10 s later SIGKILL), and exit"
        " with 1",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="at the end print one JSON object; what COMMAND prints goes to standard error",
    )
    parser.add_argument(
        "--mesh",
        help="axis=size,... in device order, e.g. data=1,fsdp=1,expert=8, where a program does not "
        "name it",
    )
    parser.add_argument(
        "--expert-axes",
        help="mesh axes of the experts (default: expert, or those that split the experts' weights)",
    )
    parser.add_argument(
        "--stages",
        metavar="WORD=STAGE,...",
        help="your own scopes and the stages they stand for, e.g. wi_0=experts,gate=router",
    )
    parser.add_argument(
        "--all", action="store_true", help="show every program, including small ones"
    )
    parser.add_argument(
        "--keep-cache",
        action="store_true",
        help=f"do not set {CACHE}=false for COMMAND; a program from the cache may then be missing",
    )
    given = list(argv)
    at = given.index("--") if "--" in given else len(given)
    arguments, unknown = parser.parse_known_args(given[:at])
    if unknown and at == len(given):
        raise UserError(f"COMMAND goes after --: {prog} -- {' '.join(unknown)}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    command = given[at + 1 :]
    if not command:
        raise UserError(f"no COMMAND\nfix: {prog} [options] -- python train.py ...")
    if arguments.stop and not arguments.expect:
        raise UserError("--stop needs --expect VERDICT: it ends COMMAND when that does not hold")
    return arguments, command
