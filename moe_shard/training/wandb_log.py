"""Log a run's numbers to Weights & Biases, the optional package wandb.

A run keeps one id, in `wandb.json` of its folder, under which later starts go on. Whatever fails
there is said once, and training goes on without it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from moe_shard.config.schema import Config
from moe_shard.errors import UserError, first_line
from moe_shard.files import read_small, write_text
from moe_shard.training.metrics import Sink

WANDB_FILE = "wandb.json"
_SECONDS = 30
"""Time for which a server that does not answer may hold up the start of a run, and its end."""


def require_wandb(config: Config) -> None:
    """Check that the package is there if it is asked for.

    Raises:
        UserError: it is not.
    """
    if config.train.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "enable_wandb=true needs the package wandb, which is not installed\n"
            "fix: pip install 'moe_shard[wandb]', or enable_wandb=false"
        )


class WandbLog:
    """Pass the numbers of steps on to a run of wandb.

    Steps that it has from an earlier start are left out: they are the same numbers, and wandb takes
    no step twice. wandb's own environment variables hold, such as WANDB_MODE=offline.

    Args:
        config: configuration of the run; shown there.
        folder: folder of the run.
        say: receives where the run is seen, or why it is not.
    """

    def __init__(self, config: Config, folder: Path, say: Callable[[str], object]) -> None:
        self._say = say
        self._run: Any = None
        self._first = 0
        try:
            wandb: Any = import_module("wandb")
            self._run = wandb.init(
                project=config.train.wandb_project_name,
                name=config.train.wandb_run_name or config.run.run_name,
                id=_kept_id(folder / WANDB_FILE),
                resume="allow",
                dir=str(folder),
                config=yaml.safe_load(config.to_yaml()),
                settings=wandb.Settings(
                    silent=True,
                    console="off",  # what is printed is the run's own
                    init_timeout=_SECONDS,
                    login_timeout=_SECONDS,
                    finish_timeout=_SECONDS,
                ),
            )
            self._first = int(self._run.starting_step)
            if self._run.disabled:
                say("wandb is disabled (WANDB_MODE, or no API key was given): nothing is logged")
            elif self._run.offline:
                say(f"wandb is offline: `wandb sync {folder}/wandb/offline-run-*` sends it")
            else:
                say(f"wandb: {self._run.url}")
        except Exception as error:  # whatever a foreign package raises
            self._gone(error)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step, by their tags."""
        if self._run is None or step < self._first:
            return
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:
            self._gone(error)

    def close(self) -> None:
        """Send what is left, for some seconds at most."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._gone(error)

    def _gone(self, error: Exception) -> None:
        self._run = None
        self._say(f"wandb: {first_line(error).rstrip('.')}; training goes on without it")


def wandb_sinks(config: Config, folder: Path, say: Callable[[str], object]) -> tuple[Sink, ...]:
    """Start the log if it is asked for."""
    return (WandbLog(config, folder, say),) if config.train.enable_wandb else ()


def _kept_id(path: Path) -> str:
    """Return the id that earlier starts had, or a new one, which is kept.

    Raises:
        OSError: it cannot be written.
    """
    with suppress(OSError, ValueError, RecursionError):
        content: Any = json.loads(read_small(path))
        if isinstance(content, dict) and isinstance(kept := content.get("id"), str) and kept:
            return kept
    found = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
    write_text(path, json.dumps({"id": found}) + "\n")
    return found
