"""Write files and folders so that a reader sees them complete or not at all.

What is written gets its name only when it is complete, by a rename within its folder, which the
file system does in one step. A crash of the machine itself may still lose it: nothing here waits
for the disk, and what a run cannot lose, its checkpoints, Orbax writes.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import select
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moe_shard.errors import UserError

SMALL = 16 << 20
"""Most bytes of a file that a person writes by hand: a configuration, a rule table."""
_WAIT_S = 10.0
_MOST_FILES = 100_000


def expanded(path: str | Path) -> Path:
    """Return a path with `~` replaced by a home directory.

    Raises:
        UserError: it names a user who has none.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{str(path)[:100]}: no home directory is known of that user\nfix: the whole path"
        ) from None


def read_small(path: Path, most: int = SMALL) -> bytes:
    """Read a file, a pipe or a device from its start, but never without end.

    Args:
        path: what to read.
        most: largest number of bytes.

    Raises:
        UserError: it is larger, or a pipe into which nothing is written for 10 s.
        OSError: it cannot be read.
    """
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        chunks: list[bytes] = []
        total, deadline = 0, time.monotonic() + _WAIT_S
        while size <= most and total <= most:
            try:
                chunk = os.read(descriptor, 1 << 20)
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                    raise UserError(
                        f"{path}: nothing came through this pipe in {_WAIT_S:g} s\n"
                        "fix: the path of a file"
                    ) from None
                continue
            if not chunk:
                return b"".join(chunks)
            chunks.append(chunk)
            total += len(chunk)
    finally:
        os.close(descriptor)
    raise UserError(
        f"{path}: more than {most >> 20} MiB, which is no file of settings\n"
        "fix: the path of a .yml file"
    )


def pass_over_hole(file: BinaryIO) -> None:
    """Move an open file on to its next byte that was ever written, or to its end.

    A file that a crash has left may hold gigabytes of zeros that no disk has.
    """
    at = file.tell()
    try:
        file.seek(os.lseek(file.fileno(), at, os.SEEK_DATA))
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole follows
            file.seek(0, os.SEEK_END)
        else:  # a file system that does not know
            file.seek(at)


def find_below(folder: Path, pattern: str) -> list[Path]:
    """Return the files below a folder whose names match a pattern of the shell's.

    Links to folders are not followed.

    Raises:
        UserError: there are too many files to look at, as in the root of a disk.
    """
    found: list[Path] = []
    seen = 0
    for parent, folders, names in os.walk(folder):
        seen += len(folders) + len(names)
        if seen > _MOST_FILES:
            raise UserError(
                f"{folder}: more than {_MOST_FILES:,} files are below it\n"
                "fix: the folder itself in which they are"
            )
        found += (Path(parent, name) for name in names if fnmatch.fnmatchcase(name, pattern))
    return found


def next_numbered(path: Path) -> Path:
    """Return the first of `path.1`, `path.2`, ... that is not there."""
    number = 1
    while os.path.lexists(found := path.with_name(f"{path.name}.{number}")):
        number += 1
    return found


def write_text(path: Path, text: str) -> None:
    """Write a text file, as UTF-8, so that a reader sees all of it or what was there before.

    Raises:
        OSError: it cannot be written; no partial file is left.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or what was there before.

    Where the path is a link, what it points to is written, and the link stays. A device or a pipe
    (`/dev/stdout`) is written to, as a shell does it, and never replaced by a file.

    Raises:
        OSError: it cannot be written; no partial file is left.
    """
    if path.exists() and not path.is_file():
        _write_into(path, content)
        return
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    aside = _aside(path)
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _write_into(path: Path, content: bytes) -> None:
    """Write to what is no file.

    Raises:
        OSError: it is a folder, or a pipe that nobody reads.
    """
    # Without O_NONBLOCK, opening a named pipe would wait for a reader.
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.set_blocking(descriptor, True)
        while content:
            content = content[os.write(descriptor, content) :]
    finally:
        os.close(descriptor)


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
