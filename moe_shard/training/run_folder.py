"""Hold a run's folder: one process writes to it at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_shard.checkpoints.bucket import is_address
from moe_shard.checkpoints.run_files import COPIED, address_of, fetch, here, mark
from moe_shard.config.schema import RunConfig
from moe_shard.errors import UserError
from moe_shard.files import expanded


def run_path(config: RunConfig) -> Path:
    """Return a run's folder, `<base_output_directory>/<run_name>`, absolute; it need not exist.

    Raises:
        UserError: the run's name is no folder name, or `~` names nobody's home.
    """
    if config.run_name in {".", ".."} or "/" in config.run_name or "\0" in config.run_name:
        raise UserError(
            f"run_name={config.run_name!r} is not the name of a folder\n"
            "fix: a name without '/'; base_output_directory says where it is made"
        )
    if is_address(config.base_output_directory):
        return here(_address(config))
    return expanded(config.base_output_directory).resolve() / config.run_name


def reach_run(config: RunConfig) -> Path:
    """Return a run's folder, with its files in it where they are in a bucket and ahead.

    Raises:
        UserError: as `run_path`; or the bucket cannot be reached.
    """
    return fetch(_address(config)) if is_address(config.base_output_directory) else run_path(config)


def _address(config: RunConfig) -> str:
    return f"{config.base_output_directory.rstrip('/')}/{config.run_name}"


@contextmanager
def open_run(config: RunConfig, *, writer: bool = True) -> Iterator[Path]:
    """Create the run's folder and hold it while the block runs.

    Args:
        config: names and places.
        writer: whether this process writes the run's files, as one of each run does, and locks the
            folder against other runs.

    Yields:
        `<base_output_directory>/<run_name>`, absolute; this machine's part of it, if that is in a
        bucket.

    Raises:
        UserError: the run's name is no folder name, the folder cannot be written, or another
            process is writing to it.
    """
    folder = reach_run(config)
    _check_names(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_address(config.base_output_directory) and address_of(folder) is None:
            mark(folder, _address(config), 0)
        lock = (folder / ".lock").open("w") if writer else None
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}\n"
            "fix: base_output_directory=FOLDER that you may write to"
        ) from error
    if lock is None:
        yield folder
        return
    with lock:
        try:
            # Released by the system when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process is training into {folder}\n"
                "fix: wait for it, or choose another run_name"
            ) from error
        yield folder


_FILES = (
    *(".lock", "config.yml", "lowering.json", "metrics.jsonl", "layers.jsonl"),
    *("goodput.json", "eval.jsonl", "best.json", "wandb.json", COPIED),
)
_FOLDERS = ("tensorboard", "checkpoints", "hlo", "profile", "wandb")


def _check_names(folder: Path) -> None:
    """Refuse a folder where something else has the name of one of a run's files.

    Raises:
        UserError: a folder, a pipe or a device is where a file goes, or a file where a folder goes.
    """
    for names, is_right, kind in (
        ({*_FILES, *_records(folder)}, os.path.isfile, "file"),
        (_FOLDERS, os.path.isdir, "folder"),
    ):
        for name in sorted(names):
            path = folder / name
            # A link to nothing is fine: what is written goes where it points.
            if os.path.exists(path) and not is_right(path):
                raise UserError(
                    f"{path} is no {kind}, and a run writes a {kind} of that name\n"
                    "fix: move it away, or choose another run_name"
                )
            if kind == "folder" and os.path.islink(path) and not os.path.exists(path):
                raise UserError(
                    f"{path} is a link to nothing\nfix: make the folder that it names, or remove it"
                )


def _records(folder: Path) -> list[str]:
    """Return the names of files of records, whichever keys have them written."""
    try:
        return [each for each in os.listdir(folder) if each.endswith(".jsonl")]
    except OSError:  # not there yet, or reported when it is made
        return []
