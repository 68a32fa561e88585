"""Copy a run's files to the bucket of its checkpoints, while it trains."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moe_shard.checkpoints.bucket import Bucket
from moe_shard.checkpoints.checkpoint import Checkpointer
from moe_shard.checkpoints.run_files import CHECKPOINTS, COPIED, address_of, copies_of, fetch, mark
from moe_shard.checkpoints.whole import on_first
from moe_shard.data.corpus import Say
from moe_shard.errors import UserError

_LAST_S = 90.0
"""Longest wait for the copy at the end of a run."""
_LEFT_OUT = {CHECKPOINTS, "wandb"}


class Copies:
    """Copy what has changed, in the background, whenever a checkpoint is complete.

    Args:
        folder: folder of the run.
        address: where it is in a bucket.
        say: receives a line where a copy fails.
    """

    def __init__(self, folder: Path, address: str, say: Say) -> None:
        self._folder, self._address, self._say = folder, address, say
        self._bucket = Bucket(address)
        self._copied: dict[str, tuple[int, int]] = {}
        self._thread: threading.Thread | None = None
        self._due = threading.Event()

    def copy(self) -> None:
        """Copy now.

        Raises:
            OSError: files cannot be read, or the bucket cannot be written.
        """
        # Counted here first: if the copy is cut short, this folder is ahead, and copied again.
        content = mark(
            self._folder, self._address, copies_of((self._folder / COPIED).read_bytes) + 1
        )
        for name, version in self._files():
            if self._copied.get(name) != version:
                with suppress(FileNotFoundError):  # removed meanwhile
                    self._bucket.write(name, (self._folder / name).read_bytes())
                    self._copied[name] = version
        self._bucket.write(COPIED, content)

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the files, with what changes when they do."""
        for where, folders, names in os.walk(self._folder):
            path = Path(where)
            folders[:] = [each for each in folders if not each.startswith(".")]
            if path == self._folder:
                folders[:] = [each for each in folders if each not in _LEFT_OUT]
                names.remove(COPIED)
            for name in names:
                if not name.startswith("."):
                    with suppress(FileNotFoundError):
                        found = (path / name).stat()
                        relative = str((path / name).relative_to(self._folder))
                        yield relative, (found.st_size, found.st_mtime_ns)

    def start(self) -> None:
        """Copy in the background, once more if a copy is on its way."""
        self._due.set()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, daemon=True, name="copies")
            self._thread.start()

    def _run(self) -> None:
        while self._due.is_set():
            self._due.clear()
            try:
                self.copy()
            except OSError as error:
                self._say(
                    f"the run's files were not copied to {self._address}: {error.strerror}; they "
                    f"are in {self._folder}, and are copied again with the next checkpoint"
                )

    def finish(self) -> None:
        """Copy a last time, for as long as a run may wait at its end."""
        if self._thread is not None:
            self._thread.join(_LAST_S)
        self.start()
        assert self._thread is not None, "just started"
        self._thread.join(_LAST_S)
        if self._thread.is_alive():
            self._say(
                f"the run's last files were not copied to {self._address} in {_LAST_S:g} s; they "
                f"are in {self._folder}, and the next start there copies them"
            )


@contextmanager
def kept_in_bucket(
    folder: Path, *, writer: bool, say: Say
) -> Iterator[Callable[[Checkpointer | None], None]]:
    """Keep copies of a run's files in the bucket that its `bucket.json` names, if it has one.

    At the start, process 0 copies what it has, and the others then fetch that: all read the same
    records of earlier starts, which decide what is the best checkpoint.

    Args:
        folder: folder of the run on this machine.
        writer: whether this process writes the run's files.
        say: receives a line on where they are, and where a copy fails.

    Yields:
        What has the files copied whenever one of a run's checkpoints is complete.

    Raises:
        UserError: the bucket cannot be written.
    """
    address = address_of(folder)
    if address is None:
        yield lambda _: None
        return
    copies = Copies(folder, address, say)

    def first() -> None:
        try:
            copies.copy()
        except OSError as error:
            raise UserError(
                f"cannot write to {address}: {error.strerror}\n"
                "fix: base_output_directory=gs://BUCKET/PATH that you may write to"
            ) from error

    on_first(first)
    if not writer:
        fetch(address)
        yield lambda _: None
        return
    say(f"the run's files are in {folder}, and copied to {address} with every checkpoint")

    def follow(checkpointer: Checkpointer | None) -> None:
        if checkpointer is not None:
            checkpointer.when_saved.append(copies.start)

    try:
        yield follow
    finally:
        copies.finish()
