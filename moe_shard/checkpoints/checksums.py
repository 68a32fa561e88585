"""Write a checksum of every file of a checkpoint as part of its commit, and verify them.

Orbax has none of its own: it returns numbers for arrays with flipped bits. `checksums.json` names
the files with their sizes and SHA-256, the number of updates and the run, and carries a checksum of
itself. It is written before the checkpoint gets its name, so that a checkpoint has it or is not
complete. Orbax, and MaxText through it, ignore the file.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moe_shard.errors import UserError, first_line
from moe_shard.files import read_small, write_text

CHECKSUMS = "checksums.json"
_LARGEST = 100_000_000  # bytes
CUSTOM_METADATA = {"checksums": CHECKSUMS}
"""What Orbax stores in `_CHECKPOINT_METADATA`, so that a missing manifest is missed."""
_THREADS = 8


class Damage(Exception):
    """Say in one line what is wrong with a checkpoint."""


@dataclass(frozen=True)
class Checksums:
    """Hold what `checksums.json` says.

    Attributes:
        updates: the number of updates after which the checkpoint was saved.
        run: names the run that saved it; empty for an imported model.
        files: path in the checkpoint -> size in bytes, SHA-256 in hexadecimal; in a bucket, the
            checksums that it has itself.
    """

    updates: int
    run: str
    files: Mapping[str, tuple[int, str]]

    @property
    def bytes(self) -> int:
        """Return the size of the checkpoint in bytes."""
        return sum(size for size, _ in self.files.values())


def write_manifest(folder: Path, *, updates: int, run: str) -> None:
    """Write the checksums of all files in a folder into it.

    Raises:
        OSError: a file cannot be read, or the manifest cannot be written.
    """
    names = _files_in(folder)
    sizes = [(folder / name).stat().st_size for name in names]
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(lambda name: _sha256(folder / name), names))
    files = {name: (size, sha) for name, size, sha in zip(names, sizes, sums, strict=True)}
    text = manifest_text(files, algorithm="sha256", updates=updates, run=run)
    write_text(folder / CHECKSUMS, text)


def manifest_text(
    files: Mapping[str, tuple[int, str]], *, algorithm: str, updates: int, run: str
) -> str:
    """Return the text of a manifest, which carries a checksum of itself.

    Args:
        files: path in the checkpoint -> size in bytes, checksum.
        algorithm: what the checksums are.
        updates: the number of updates that names the checkpoint.
        run: names the run.
    """
    listed = {name: [*each] for name, each in files.items()}
    content = {"algorithm": algorithm, "updates": updates, "run": run, "files": listed}
    return json.dumps(content | {"of_this": _of_content(content)}, indent=1) + "\n"


def parse_manifest(text: bytes) -> Checksums:
    """Read the text of a manifest.

    Raises:
        Damage: it is damaged.
    """
    try:
        content = json.loads(text)
        if content.pop("of_this") != _of_content(content):
            raise ValueError("its own checksum differs")
        files = {name: (int(size), str(of_it)) for name, (size, of_it) in content["files"].items()}
        return Checksums(int(content["updates"]), str(content["run"]), files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damage(f"{CHECKSUMS} cannot be read: {first_line(error, 80)}") from error


def read_manifest(folder: Path) -> Checksums | None:
    """Read the manifest of a checkpoint; None if it was saved without one.

    Raises:
        Damage: it is damaged, or is missing from a checkpoint that was saved with one.
    """
    try:
        return parse_manifest(read_small(folder / CHECKSUMS, _LARGEST))
    except FileNotFoundError:
        if _had_manifest(folder):
            raise Damage(f"{CHECKSUMS} is missing") from None
        return None
    except (OSError, UserError) as error:
        raise Damage(f"{CHECKSUMS} cannot be read: {first_line(error, 80)}") from error


def says_manifest(metadata: bytes) -> bool:
    """Return whether `_CHECKPOINT_METADATA` says that its checkpoint has a manifest."""
    return f'"{CHECKSUMS}"'.encode() in metadata


def check_sizes(folder: Path, manifest: Checksums) -> tuple[str, ...]:
    """Compare the files that are there with those of the manifest.

    Returns:
        Files that the manifest does not name.

    Raises:
        Damage: a file is missing or has another size.
    """
    for name, (size, _) in manifest.files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise Damage(f"{name} cannot be read ({error.strerror})") from error
        if found != size:
            raise Damage(f"{name} has {found:,} bytes of {size:,}")
    return tuple(sorted({*_files_in(folder)} - {*manifest.files, CHECKSUMS}))


def check_sums(folder: Path, manifest: Checksums, *, part: int = 0, parts: int = 1) -> None:
    """Compare the contents of files with their checksums.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        part: which part of the files to read, from 0.
        parts: parts that the files are divided into, by size; each process reads one.

    Raises:
        Damage: a file cannot be read or has other contents.
    """
    names = sorted(manifest.files, key=lambda name: (-manifest.files[name][0], name))[part::parts]

    def differs(name: str) -> str | None:
        try:
            return None if _sha256(folder / name) == manifest.files[name][1] else name
        except OSError as error:
            raise Damage(f"{name} cannot be read ({error.strerror})") from error

    with ThreadPoolExecutor(_THREADS) as pool:
        found = next((name for name in pool.map(differs, names) if name), None)
    if found:
        raise Damage(f"{found} has other contents than were saved")


class CreatedOrHeard:
    """Let the other processes go on where this one cannot create a checkpoint's folder.

    They wait until it is there, and hear of errors at the end. Goes before one of Orbax's classes
    of temporary paths.
    """

    _not_created: Exception | None = None

    async def create(self) -> Any:
        """Create the folder, or keep the reason why not."""
        base: Any = super()
        try:
            return await base.create()
        except Exception as error:
            if jax.process_count() == 1:
                raise
            self._not_created = error
            return base.get()

    def require_created(self) -> None:
        """Raise what kept the folder from being created."""
        if self._not_created:
            raise self._not_created


def committed_with_checksums(run: Callable[[], str]) -> type[Any]:
    """Return the class by which Orbax names a checkpoint that is complete, with its manifest.

    Orbax calls it on the process that renames, after all processes have written.

    Args:
        run: returns the name of the run; called when a checkpoint is complete.
    """

    class SavedWithChecksums(CreatedOrHeard, ocp.path.atomicity.AtomicRenameTemporaryPath):
        _final_path: Any

        async def finalize(self) -> None:
            self.require_created()
            final = Path(self._final_path)
            if not final.name.isdigit():  # a part of a checkpoint
                await super().finalize()
                return
            # Orbax's last files are written by its own `finalize`, which renames as well: to a name
            # that still counts as temporary.
            whole = Path(f"{self.get()}.whole")
            await asyncio.to_thread(shutil.rmtree, whole, ignore_errors=True)
            self._final_path = type(self._final_path)(whole)
            try:
                await super().finalize()
            finally:
                self._final_path = type(self._final_path)(final)
            await asyncio.to_thread(write_manifest, whole, updates=int(final.name), run=run())
            await asyncio.to_thread(whole.rename, final)

    return SavedWithChecksums


def _had_manifest(folder: Path) -> bool:
    try:
        return says_manifest((folder / "_CHECKPOINT_METADATA").read_bytes())
    except OSError:
        return False


def _files_in(folder: Path) -> list[str]:
    found: list[str] = []
    for here, _, names in os.walk(folder):
        found += (str((Path(here) / name).relative_to(folder)) for name in names)
    return sorted(found)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_content(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
