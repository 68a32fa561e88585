"""Find the text files that `dataset_path` names, each once, in the same order on every machine."""

from __future__ import annotations

import errno
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_shard.errors import UserError

PROBE_BYTES = 4096
_OF_THE_SYSTEM = frozenset({"/", "/dev", "/proc", "/sys"})
"""Folders that take hours to read, or have no end."""
NOT_LIBRARY_TEXT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)


def find_documents(paths: Sequence[str]) -> tuple[Path, ...]:
    """List the text files that `dataset_path` names, each file once.

    The order is that of `paths`, then of the names below each: the same on every machine that
    has the same files, whatever their folder.

    Args:
        paths: files; folders, searched recursively; globs, in which `**` spans folders. Inside
            folders and globs, hidden, empty and binary files are skipped. If empty, the source
            text of the running interpreter's standard library, without its tests.

    Raises:
        UserError: a path matches no text; a file named by itself is empty, binary or not a file; a
            file or folder cannot be read.
    """
    if not paths:
        return _standard_library()
    found: dict[tuple[int, int], Path] = {}
    for pattern in paths:
        # Overlapping patterns and links may name a file twice; it counts once.
        for path in _text_files(pattern):
            info = path.stat()
            found.setdefault((info.st_dev, info.st_ino), path)
    return tuple(found.values())


def _standard_library() -> tuple[Path, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _files_below(root, NOT_LIBRARY_TEXT) if root.is_dir() else ()
    documents = tuple(file for file in files if file.suffix == ".py" and file.stat().st_size)
    if not documents:
        raise UserError(
            f"this Python has no source text of its standard library below {root}\n"
            "fix: dataset_path=FILE, FOLDER or GLOB of text"
        )
    return documents


def _text_files(pattern: str) -> list[Path]:
    path = Path(os.path.expanduser(pattern))
    named = pattern != "" and os.path.lexists(path)
    if named and not os.path.isdir(path):
        if problem := _not_text(path):
            raise UserError(f"dataset_path: {path} {problem}\nfix: name a file of UTF-8 text")
        return [path]
    if named and os.path.realpath(path) in _OF_THE_SYSTEM:
        raise UserError(
            f"dataset_path: {pattern} is the system's, not a folder of text\n"
            "fix: the folder in which the text is"
        )
    files = list(dict.fromkeys(_files_below(path) if named else _glob(pattern, path)))
    if not named and not files:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(
            f"dataset_path: {pattern!r} matches nothing{where}\n"
            "fix: an existing file, folder or glob ('**' spans folders; hidden files do not match)"
        )
    documents = [file for file in files if _not_text(file) is None]
    if not documents:
        raise UserError(
            f"dataset_path: {pattern!r} holds no text: {len(files)} files, all empty or binary\n"
            "fix: a folder or glob with at least one file of UTF-8 text that is not hidden"
        )
    return documents


def _not_text(path: Path) -> str | None:
    """Explain why a file is not text; return None if it is."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for its writer
            return "is not a regular file"
        if info.st_size == 0:
            return "is empty"
        with path.open("rb", buffering=0) as file:
            binary = b"\0" in file.read(PROBE_BYTES)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return "is a link to nothing"
        raise unreadable(path, error) from error
    return f"is binary: a zero byte in its first {PROBE_BYTES}" if binary else None


def unreadable(path: str | Path, error: OSError) -> UserError:
    """Make the error for a file or folder that the system does not open."""
    return UserError(
        f"dataset_path: {path} cannot be read: {error.strerror}\nfix: its permissions or the path"
    )


def _files_below(folder: Path, skip: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files below a folder, sorted; follow links, enter each folder once."""

    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error) from error

    entered = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        info = os.stat(parent)
        if (info.st_dev, info.st_ino) in entered:  # a link to a parent would never end
            folders.clear()
            continue
        entered.add((info.st_dev, info.st_ino))
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in skip)
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _glob(pattern: str, path: Path) -> Iterator[Path]:
    """Yield the files that a glob matches, or that are below a folder it matches, sorted."""
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts))
    base, rest = Path(*parts[:first]), parts[first:]
    hidden = any(part.startswith(".") for part in rest)
    try:
        # pathlib's `**` does not follow links. That of `glob` does: 2**40 paths for two cycles.
        matches = sorted(base.glob(str(Path(*rest)))) if rest else []
    except ValueError as error:
        raise UserError(
            f"dataset_path: {pattern!r} is not a glob: {error}\n"
            "fix: '**' stands alone between slashes, as in 'data/**/*.txt'"
        ) from error
    for match in matches:
        if hidden or not any(p.startswith(".") for p in match.relative_to(base).parts):
            yield from _files_below(match) if os.path.isdir(match) else (match,)
