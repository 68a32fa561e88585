"""Run a case, in this process or one of its own, and judge the answer by the contract."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, cast
from unittest import mock

from moe_shard.cli import main
from moe_shard.config.schema import Config
from moe_shard.errors import run_command
from moe_shard.runtime.team import Team
from tests.hostile.cases import ROOT, Case
from tests.hostile.generated import make_case

LIMIT_S = 30
TRAINS_S = 150
"""Seconds for a process of its own, which may compile and train where nothing is wrong."""
ASIDE = re.compile(r"\..*\.[0-9a-f]{12}$")
OTHERS_LINES = ("note: ", "warning: ", "rule conflict: ")
SLOW = (
    "moe_shard.runtime.compile_target.compile_for_target",
    "moe_shard.runtime.explained.explain_config",
    "moe_shard.runtime.layer_bench.measure",
    "moe_shard.runtime.tune.tune",
    "moe_shard.runtime.step_bench.prepare_own",
    "moe_shard.cli.supervise._Supervisor",
    "moe_shard.cli.watch.hold_signals",
)
"""What takes seconds, or a process, once the input has been accepted: not called."""


class _Accepted(SystemExit):
    """End a command whose input has been accepted."""


class _TooLong(BaseException):
    """End a command that does not answer."""


@dataclass(frozen=True)
class Verdict:
    """Hold what a case did.

    Attributes:
        seed: makes the case again.
        kind: its generator.
        code: exit code; None where an exception escaped, or it took too long.
        wrong: what the contract does not allow; empty where it holds.
        errors: standard error.
        seconds: time until the answer.
    """

    seed: int
    kind: str
    code: int | None
    wrong: str
    errors: str
    seconds: float


def judge(seed: int) -> Verdict:
    """Run the case of a seed and judge it."""
    case = make_case(seed)
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        case.write(folder)
        started = time.perf_counter()
        run = _in_a_process if case.kind == "process" else _here
        code, wrong, errors = run(case, folder)
        seconds = time.perf_counter() - started
        wrong = wrong or _broken_rule(case, code, errors, folder)
    finally:
        _remove(folder)
    return Verdict(seed, case.kind, code, wrong, errors[-3000:], seconds)


def _here(case: Case, folder: Path) -> tuple[int | None, str, str]:
    """Run a case in this process; return its exit code, what is wrong, and standard error."""
    here, errors = Path.cwd(), io.StringIO()
    code: int | None = None
    wrong = ""
    try:
        os.chdir(folder)
        with _surroundings(case, errors):
            run_command(lambda: main(case.argv))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except _TooLong:
        wrong = f"no answer in {LIMIT_S} s"
        errors.write(traceback.format_exc())
    except BaseException:
        wrong = "traceback"
        errors.write(traceback.format_exc())
    finally:
        os.chdir(here)
    return code, wrong, errors.getvalue()


def _in_a_process(case: Case, folder: Path) -> tuple[int | None, str, str]:
    """Run a case in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TERM": "dumb"}
    for name, value in case.environment.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    command = [sys.executable, "-m", "moe_shard", *case.argv]
    if case.shell:
        command = ["/bin/bash", "-c", case.shell, "bash", *command]
    started = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, errors = started.communicate(timeout=TRAINS_S)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        output, errors = started.communicate()
        return None, f"no answer in {TRAINS_S} s", errors.decode(errors="replace")
    said = errors.decode(errors="replace")
    # A terminal's two outputs are one.
    traceback_in = b"Traceback" in output and "Traceback" not in said
    return started.returncode, "traceback on standard output" if traceback_in else "", said


def _remove(folder: Path) -> None:
    subprocess.run(["rm", "-rf", "--", os.fspath(folder)], check=False)
    shutil.rmtree(folder, ignore_errors=True)


def _broken_rule(case: Case, code: int | None, errors: str, folder: Path) -> str:
    lines = [line for line in errors.splitlines() if not line.startswith(OTHERS_LINES)]
    allowed: set[int | None] = {0, 1, 2, 75}
    if case.argv[:1] == ["watch"]:
        allowed |= {126, 127}  # the program's own, or a shell's that finds none
    if code not in allowed:
        return f"exit code {code}"
    if "Traceback" in errors:
        return "traceback"
    if code == 2 and len(lines) > 3:
        return f"{len(lines)} lines"
    if code and not lines and not case.shell and case.argv[:2] != ["watch", "--"]:
        return "no word on why"
    left = [name for name in _names_below(folder) if ASIDE.search(name)]
    if left:
        return f"half-written: {left[0]}"
    if code == 2 and any((folder / name).exists() for name in ("exported", "imported")):
        return "half-written: the target"
    return ""


def _names_below(folder: Path) -> list[str]:
    """Return the names of all files and folders, but for those too deep to reach by a path."""
    return [name for _, folders, files in os.walk(folder) for name in (*folders, *files)]


def _start_training(case: Case, config: Config) -> None:
    """Do all that a run does before it compiles: read folder, checkpoints and text."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from moe_shard.training.changed_settings import find_changes, keep_earlier
    from moe_shard.training.goodput import WallTime
    from moe_shard.training.loop import Trainer
    from moe_shard.training.metrics import MetricsWriter
    from moe_shard.training.run_folder import open_run
    from tests.hostile.templates import saved_state

    if case.deep:
        from moe_shard.program.step import make_program
        from moe_shard.runtime.compile import lay_out

        sharding, _ = lay_out(config)
        make_program(config, sharding)
    one = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec())
    shape = jax.ShapeDtypeStruct((1, 2, min(config.train.max_target_length, 4096)), np.int32)
    program: Any = SimpleNamespace(
        abstract_batch={"inputs": shape},
        batch_sharding=one,
        abstract_state=_abstract(saved_state(7)),
    )
    say = cast(Any, print)
    with (
        open_run(config.run) as folder,
        WallTime(folder) as wall,
        Trainer(config, program, folder, wall=wall, say=say) as trainer,
    ):
        changes = find_changes(folder, config)
        if changes:
            changes.require_possible(strict=config.train.resume_strict)
            print(*changes.lines())
        keep_earlier(folder, config.to_yaml())
        if trainer.checkpointer and trainer.first:
            state = saved_state(trainer.first)
            found = trainer.checkpointer.restore(trainer.first, _abstract(state))
            jax.tree.map(np.testing.assert_array_equal, found, state)
        if trainer.data is not None:
            next(trainer.data)
        for text in trainer.held_out:
            next(text.batches())
        with MetricsWriter(folder, first_step=1, tensorboard=True, say=say):
            pass


def _abstract(state: Any) -> Any:
    from tests.checkpoints.test_damage import abstract

    return abstract(state)


def _start_generating(source: Any, *_: Any, **__: Any) -> None:
    """Read the parameters, as generation does."""
    from moe_shard.checkpoints.run_params import restore_params
    from tests.hostile.templates import saved_state

    if source.checkpoints is not None:
        restore_params(source.checkpoints, _abstract(saved_state(7)).params, updates=source.updates)
    raise _Accepted(0)


@contextlib.contextmanager
def _surroundings(case: Case, errors: io.StringIO) -> Iterator[None]:
    """Capture output, set the environment, stop at what is slow, and end what takes too long."""

    def accept(*_: Any, **__: Any) -> None:
        raise _Accepted(0)

    def alarm(_number: int, _frame: FrameType | None) -> None:
        raise _TooLong

    def start(config: Config, _team: Team) -> None:
        _start_training(case, config)
        raise _Accepted(0)

    with contextlib.ExitStack() as stack:
        for name in SLOW:
            stack.enter_context(mock.patch(name, accept))
        stack.enter_context(mock.patch("moe_shard.training.run.run", start))
        stack.enter_context(mock.patch("moe_shard.inference.texts.generate", _start_generating))
        given = {name: value for name, value in case.environment.items() if value is not None}
        stack.enter_context(mock.patch.dict(os.environ, given))
        read = io.TextIOWrapper(io.BytesIO(case.stdin.encode("utf-8", "replace")), "utf-8")
        stack.enter_context(mock.patch.object(sys, "stdin", read))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(errors))
        previous = signal.signal(signal.SIGALRM, alarm)
        signal.alarm(LIMIT_S)
        stack.callback(signal.signal, signal.SIGALRM, previous)
        stack.callback(signal.alarm, 0)
        yield
