"""Fetch files of addresses (`gs://`, `s3://`, whatever fsspec opens) into the cache, once.

Reading goes on from local copies, so that a step never waits for a network and access stays random.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from moe_shard.config.keys import shown
from moe_shard.data.formats import needed
from moe_shard.errors import UserError, first_line
from moe_shard.files import cache_folder

_VERSIONS = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "updated", "created")
_ANSWER_S = 10.0
"""Longest wait for a server's first answer, and for credentials."""
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "abfs": "adlfs", "hf": "huggingface_hub"}


def is_remote(pattern: str) -> bool:
    """Return whether an item of `dataset_path` is an address, not a local path."""
    return "://" in pattern


def fetched(pattern: str, say: Callable[[str], object] = lambda _: None) -> str:
    """Copy what an address names into the cache, unless it is there; return the local folder.

    A file is copied again when the size, or what the server says of its version, has changed.

    Args:
        pattern: address of a file or a folder, or a glob.
        say: receives a line if anything was copied.

    Returns:
        The path of the one file, or of a folder that has the files by their names.

    Raises:
        UserError: nothing is there, it cannot be read, or a package is missing.
    """
    library = needed("fsspec", pattern)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs the errors that it raises
    scheme = pattern.partition("://")[0]
    with _refused_by_server(pattern, scheme):
        system, path = _reached(library, pattern)
        names = _names(system, path)
        files = {name: system.info(name) for name in names}
    if not files:
        raise UserError(
            f"dataset_path: {pattern} matches nothing\nfix: an address of files, a folder or a glob"
        )
    # Names in a bucket are any text, and become paths here.
    if leaving := [name for name in files if ".." in PurePosixPath(name).parts]:
        raise UserError(
            f"dataset_path: {pattern} names {shown(leaving[0])}, which leaves its folder\n"
            "fix: an address of files whose names have no '..' in their path"
        )
    root = cache_folder() / "remote"
    copied = total = 0
    links: dict[PurePosixPath, Path] = {}
    base = _common(list(files))
    for name, info in files.items():
        version = [str(info[key]) for key in _VERSIONS if info.get(key) is not None]
        key = repr((scheme, name, info.get("size"), version)).encode()
        digest = hashlib.blake2b(key, digest_size=16).hexdigest()
        copy = root / "files" / digest / PurePosixPath(name).name
        if not copy.is_file():
            with _refused_by_server(f"{scheme}://{name}", scheme), _aside(copy) as aside:
                system.get_file(name, os.fspath(aside))
            copied += 1
            total += copy.stat().st_size
        links[PurePosixPath(name).relative_to(base)] = copy
    if copied:
        say(f"text: {pattern}: {copied:,} files, {total / 1e6:,.2f} MB copied to {root}")
    if len(links) == 1 and path.rstrip("/") in files:
        return os.fspath(next(iter(links.values())))
    return os.fspath(_tree(root / "trees", pattern, links))


def _reached(library: Any, pattern: str) -> tuple[Any, str]:
    """Return an address's file system and the path in it, if its server answers in seconds.

    Libraries try for minutes, also to find who is asking.

    Raises:
        Exception: whatever the library raises, or a TimeoutError.
    """
    found: list[tuple[Any, str]] = []
    failed: list[Exception] = []

    def probe() -> None:
        try:
            system, path = library.core.url_to_fs(pattern)
            if _is_glob(path):
                above = path[: min(path.find(char) for char in "*?[" if char in path)]
                with suppress(FileNotFoundError):
                    system.ls(above.rpartition("/")[0])
            else:
                system.info(path)
            found.append((system, path))
        except Exception as error:  # each system has its own
            failed.append(error)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_ANSWER_S)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError(f"no answer in {_ANSWER_S:g} s")
    return found[0]


def _is_glob(path: str) -> bool:
    return any(char in path for char in "*?[")


def _names(system: Any, path: str) -> list[str]:
    """List the files that a path names, sorted."""
    matched = system.glob(path) if _is_glob(path) else [path]
    found: set[str] = set()
    for each in matched:
        found |= set(system.find(each)) if system.isdir(each) else {each}
    return sorted(found)


def _common(names: list[str]) -> PurePosixPath:
    """Return the folder that all names are below."""
    parents = [PurePosixPath(name).parent for name in names]
    return PurePosixPath(os.path.commonpath(parents) or ".") if parents else PurePosixPath()


def _tree(folder: Path, pattern: str, links: dict[PurePosixPath, Path]) -> Path:
    """Make a folder of links, by the names that the files have where they come from."""
    key = repr((pattern, sorted((str(name), str(copy)) for name, copy in links.items()))).encode()
    tree = folder / hashlib.blake2b(key, digest_size=16).hexdigest()
    for name, copy in links.items():
        link = tree / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            aside = link.with_name(f".{uuid.uuid4().hex}")
            aside.symlink_to(copy)
            aside.replace(link)
    return tree


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Give a file its name once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{uuid.uuid4().hex}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _refused_by_server(what: str, scheme: str) -> Iterator[None]:
    """Turn what a file system of fsspec's raises into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each system has its own
        package = _PACKAGES.get(scheme, f"fsspec's package for {scheme}://")
        raise UserError(
            f"dataset_path: {what} cannot be read: {shown(first_line(error))}\n"
            f"fix: the address, who may read it, or pip install {package}"
        ) from error
