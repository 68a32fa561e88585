"""Write files and folders so that a reader sees them complete or not at all.

What is written gets its name only when it is complete, by a rename within its folder, which the
file system does in one step. A crash of the machine itself may still lose it: nothing here waits
for the disk, and what a run cannot lose, its checkpoints, Orbax writes.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_shard.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a text file, as UTF-8, so that a reader sees all of it or what was there before.

    Raises:
        OSError: it cannot be written; no partial file is left.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or what was there before.

    Raises:
        OSError: it cannot be written; no partial file is left.
    """
    aside = _aside(path)
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path, aside: Path | None = None) -> Iterator[Path]:
    """Create a folder that has its name once the block has ended, and is removed if it raises.

    Args:
        path: the name; nothing may be there but an empty folder.
        aside: where the block writes, in the folder that `path` is in; None: a name of this
            block's own, so that several processes may write the same folder at once.

    Yields:
        The folder to write into.

    Raises:
        UserError: `aside` is there already.
        OSError: the folder cannot be made or renamed.
    """
    aside = aside or _aside(path)
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.mkdir()
    except FileExistsError as error:
        raise UserError(
            f"{aside} is there: another process writes it, or one was killed\n"
            "fix: remove it, if no process is writing it"
        ) from error
    try:
        yield aside
        aside.rename(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def cache_folder() -> Path:
    """Return where this user's caches are: `moe_shard` in `$XDG_CACHE_HOME`, else in `~/.cache`.

    Raises:
        RuntimeError: there is neither that variable nor a home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moe_shard"


def _aside(path: Path) -> Path:
    """Return a name in the same folder that no other process has, on this machine or another."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
