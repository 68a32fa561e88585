"""Run a case in this process, and judge the answer by the contract."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

from moe_shard.cli import main
from moe_shard.config.schema import Config
from moe_shard.errors import run_command
from moe_shard.runtime.team import Team
from moe_shard.training.changed_settings import find_changes, keep_earlier
from moe_shard.training.metrics import MetricsWriter
from moe_shard.training.run_folder import open_run
from tests.hostile.generated import Case, make_case

LIMIT_S = 30
ASIDE = re.compile(r"\..*\.[0-9a-f]{12}$")
SLOW = (
    "moe_shard.runtime.compile_target.compile_for_target",
    "moe_shard.runtime.explained.explain_config",
    "moe_shard.inference.texts.generate",
    "moe_shard.runtime.layer_bench.measure",
)
"""What takes seconds once the input has been accepted: not called."""


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
    case, started = make_case(seed), time.perf_counter()
    folder, here = Path(tempfile.mkdtemp(prefix="hostile-")), Path.cwd()
    errors = io.StringIO()
    code: int | None = None
    wrong = ""
    try:
        case.write(folder)
        os.chdir(folder)
        with _surroundings(case, errors):
            run_command(lambda: main(case.argv))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except _TooLong:
        wrong = f"no answer in {LIMIT_S} s"
    except BaseException:
        wrong = "traceback"
        errors.write(traceback.format_exc())
    finally:
        os.chdir(here)
    seconds = time.perf_counter() - started
    wrong = wrong or _broken_rule(code, errors.getvalue(), folder)
    shutil.rmtree(folder, ignore_errors=True)
    return Verdict(seed, case.kind, code, wrong, errors.getvalue()[-3000:], seconds)


def _broken_rule(code: int | None, errors: str, folder: Path) -> str:
    lines = [line for line in errors.splitlines() if not line.startswith(("note: ", "warning: "))]
    if code not in {0, 1, 2, 75}:
        return f"exit code {code}"
    if "Traceback" in errors:
        return "traceback"
    if code == 2 and len(lines) > 3:
        return f"{len(lines)} lines"
    if code and not lines:
        return "no word on why"
    left = [path.name for path in folder.rglob("*") if ASIDE.search(path.name)]
    if left:
        return f"half-written: {left[0]}"
    if code == 2 and any((folder / name).exists() for name in ("exported", "imported")):
        return "half-written: the target"
    return ""


@contextlib.contextmanager
def _surroundings(case: Case, errors: io.StringIO) -> Iterator[None]:
    """Capture output, set the environment, stop at what is slow, and end what takes too long."""

    def accept(*_: Any, **__: Any) -> None:
        raise _Accepted(0)

    def alarm(_number: int, _frame: FrameType | None) -> None:
        raise _TooLong

    def start(config: Config, _team: Team) -> None:
        # All that a run does with its folder before it compiles.
        with open_run(config.run) as folder:
            changes = find_changes(folder, config)
            if changes:
                changes.require_possible(strict=config.train.resume_strict)
                print(*changes.lines())
            keep_earlier(folder, config.to_yaml())
            with MetricsWriter(folder, first_step=1, tensorboard=True):
                pass
        raise _Accepted(0)

    with contextlib.ExitStack() as stack:
        for name in SLOW:
            stack.enter_context(mock.patch(name, accept))
        stack.enter_context(mock.patch("moe_shard.training.run.run", start))
        stack.enter_context(mock.patch.dict(os.environ, case.environment))
        given = io.TextIOWrapper(io.BytesIO(case.stdin.encode("utf-8", "replace")), "utf-8")
        stack.enter_context(mock.patch.object(sys, "stdin", given))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(errors))
        previous = signal.signal(signal.SIGALRM, alarm)
        signal.alarm(LIMIT_S)
        stack.callback(signal.signal, signal.SIGALRM, previous)
        stack.callback(signal.alarm, 0)
        yield
