"""Find the files that `dataset_path` names, each once, in the same order on every machine."""

from __future__ import annotations

import errno
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_shard.data.formats import PROBE_BYTES, FileFormat, find_format
from moe_shard.data.left_out import left_out
from moe_shard.errors import UserError

_OF_THE_SYSTEM = frozenset({"/", "/dev", "/proc", "/sys"})
"""Folders that take hours to read, or have no end."""
NOT_LIBRARY_TEXT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)


@dataclass(frozen=True)
class FoundFile:
    """Describe a file that documents are read from.

    Attributes:
        path: its path.
        form: what it is.
        named: whether `dataset_path` names it by itself, not a folder or glob.
    """

    path: Path
    form: FileFormat
    named: bool


@dataclass(frozen=True)
class FoundFiles:
    """Hold what `dataset_path` names.

    Attributes:
        files: files to read, each once.
        passed_over: other files of its folders and globs, with the reason.
    """

    files: tuple[FoundFile, ...]
    passed_over: tuple[tuple[Path, str], ...] = ()


def find_documents(paths: Sequence[str]) -> tuple[Path, ...]:
    """List the files that `find_files` finds, by path."""
    return tuple(found.path for found in find_files(paths).files)


def find_files(paths: Sequence[str], *, split: str = "train") -> FoundFiles:
    """List the files of text that `dataset_path` names, each file once.

    The order is that of `paths`, then of the names below each: the same on every machine that
    has the same files, whatever their folder.

    Args:
        paths: files; folders, searched recursively; globs, in which `**` spans folders. Inside
            folders and globs, hidden and empty files are skipped, and those without text. If
            empty, the source text of the running interpreter's standard library, without its
            tests.
        split: split of a folder whose files are named by split.

    Raises:
        UserError: a path matches no text; a file named by itself is empty, binary or not a file; a
            file or folder cannot be read.
    """
    if not paths:
        found = (FoundFile(path, FileFormat("text"), named=True) for path in _standard_library())
        return FoundFiles(tuple(found))
    files: dict[tuple[int, int], FoundFile] = {}
    passed: dict[Path, str] = {}
    for pattern in paths:
        kept, others = _files_of(pattern, split)
        passed |= others
        # Overlapping patterns and links may name a file twice; it counts once.
        for each in kept:
            info = each.path.stat()
            files.setdefault((info.st_dev, info.st_ino), each)
    chosen = {each.path for each in files.values()}
    return FoundFiles(
        tuple(files.values()),
        tuple((path, reason) for path, reason in passed.items() if path not in chosen),
    )


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


def _files_of(pattern: str, split: str) -> tuple[list[FoundFile], dict[Path, str]]:
    """Return the files of one item of `dataset_path`, and what is passed over, with reasons."""
    path = Path(os.path.expanduser(pattern))
    named = pattern != "" and os.path.lexists(path)
    if named and not os.path.isdir(path):
        form = _look(path)
        if isinstance(form, str):
            raise UserError(
                f"dataset_path: {path} {form}\n"
                "fix: name a file of UTF-8 text, JSON Lines or Parquet, compressed or not"
            )
        return [FoundFile(path, form, named=True)], {}
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
    looked = {file: _look(file) for file in files}
    passed = {file: form for file, form in looked.items() if isinstance(form, str)}
    forms = {file: form for file, form in looked.items() if not isinstance(form, str)}
    if named:
        passed |= left_out(forms, path, split)
    kept = [
        FoundFile(file, form, named=False) for file, form in forms.items() if file not in passed
    ]
    if not kept:
        reasons = sorted(set(passed.values()))
        why = "all empty or binary" if not forms and all(map(_is_hollow, reasons)) else ""
        why = why or "; ".join(f"{file.name} {reason}" for file, reason in list(passed.items())[:3])
        raise UserError(
            f"dataset_path: {pattern!r} holds no text: {len(files)} files, {why}\n"
            "fix: a folder or glob with at least one file of text or records that is not hidden"
        )
    return kept, passed


def _is_hollow(reason: str) -> bool:
    return reason.startswith(("is empty", "is binary"))


def _look(path: Path) -> FileFormat | str:
    """Return what a file is, or why it is not text."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for its writer
            return "is not a regular file"
        if info.st_size == 0:
            return "is empty"
        with path.open("rb", buffering=0) as file:
            head = file.read(PROBE_BYTES)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return "is a link to nothing"
        raise unreadable(path, error) from error
    return find_format(path, head)


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
