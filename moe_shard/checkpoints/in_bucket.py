"""Keep checkpoints in a bucket: committed by a marker object, verified by the bucket's checksums.

A bucket renames nothing. Orbax writes a checkpoint under its name and then the object
`commit_success.txt`, without which it does not count. `checksums.json` is written before that
object: the size and the checksums of every other one, as the bucket computed them when it stored
it. To verify is to list, and nothing is read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from moe_shard.checkpoints.bucket import COMMITTED, Bucket, is_address
from moe_shard.checkpoints.checksums import (
    CHECKSUMS,
    Checksums,
    CreatedOrHeard,
    Damage,
    manifest_text,
    parse_manifest,
    says_manifest,
)
from moe_shard.checkpoints.place import DAMAGED, CheckpointPlace, InFolder
from moe_shard.errors import UserError, first_line
from moe_shard.units import human_bytes

_METADATA = "_CHECKPOINT_METADATA"
_AT_THE_END = {CHECKSUMS, COMMITTED, _METADATA}
"""Objects that are written, or written again, when the others have been listed."""

# It logs what it retries, and that it asks for the kind of a bucket in vain.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def place_of(path: Any) -> CheckpointPlace:
    """Return the place that a path names: in a bucket, or in a folder."""
    return InBucket(str(path)) if is_address(path) else InFolder(Path(path))


class InBucket(CheckpointPlace):
    """Keep checkpoints in a bucket, which every process writes and reads without a shared disk."""

    closes_after_failure = False
    fix = "see that the bucket can be reached and written"
    allow = "base_output_directory=gs://BUCKET/PATH that you may write to"

    def __init__(self, address: str) -> None:
        self.path = epath.Path(address)
        self._bucket = Bucket(address)

    def names(self) -> list[str]:
        """Return the names of what a bucket shows as folders."""
        with self._readable():
            return self._bucket.listed()[1]

    def numbers(self) -> list[str]:
        """Return those that have the marker."""
        with self._readable():
            committed = {*self._bucket.checkpoints()[1]}
        return [name for name in super().numbers() if name in committed]

    def manifest(self, name: str) -> Checksums | None:
        """Read `checksums.json`."""
        try:
            return parse_manifest(self._bucket.read(f"{name}/{CHECKSUMS}"))
        except FileNotFoundError:
            with suppress(OSError):
                if says_manifest(self._bucket.read(f"{name}/{_METADATA}")):
                    raise Damage(f"{CHECKSUMS} is missing") from None
            return None
        except OSError as error:
            raise Damage(f"{CHECKSUMS} cannot be read: {first_line(error, 80)}") from error

    def compare(
        self,
        name: str,
        manifest: Checksums,
        *,
        verify: bool,
        part: int,
        parts: int,  # noqa: ARG002
    ) -> tuple[str, ...]:
        """Compare sizes and the bucket's checksums with those at the commit, on one process."""
        if part:  # one list has all of it
            return ()
        try:
            found = self._bucket.find(name)
        except OSError as error:
            raise Damage(f"it cannot be listed: {error.strerror}") from error
        for each, (size, sums) in manifest.files.items():
            if each not in found:
                raise Damage(f"{each} is missing")
            if found[each].size != size:
                raise Damage(f"{each} has {found[each].size:,} bytes of {size:,}")
            if verify and found[each].sums != sums:
                raise Damage(f"{each} has other contents than were saved")
        return tuple(sorted({*found} - {*manifest.files} - _AT_THE_END))

    def set_aside(self, name: str) -> str:
        """Copy a damaged checkpoint inside the bucket, then remove it under its number."""
        path = self.path / name
        try:
            taken = {*self._bucket.listed()[1]}
            free = (f"{name}{DAMAGED}-{number}" for number in range(2, len(taken) + 3))
            target = next(each for each in (f"{name}{DAMAGED}", *free) if each not in taken)
            found = [*self._bucket.find(name)]
            self._bucket.copy((f"{name}/{each}", f"{target}/{each}") for each in found)
            # From here on it does not count, and what a killed process leaves of it is removed.
            self._bucket.remove([f"{name}/{COMMITTED}"])
            self._bucket.remove(f"{name}/{each}" for each in found)
        except OSError as error:
            raise UserError(
                f"{path} is damaged and cannot be set aside: {error.strerror}\n"
                "fix: move it elsewhere; the run then continues from the one before it"
            ) from error
        return target

    def remove_unfinished(self) -> None:
        """Remove checkpoints that have no marker."""
        with suppress(OSError, UserError):  # which is tried again at the next start
            committed = {*self.numbers()}
            for name in super().numbers():
                if name not in committed:
                    self._bucket.remove(f"{name}/{each}" for each in self._bucket.find(name))

    def hindrance(self, needed: int) -> str:  # noqa: ARG002
        """Return nothing: a bucket has no end."""
        return ""

    def is_tight(self, needed: int) -> bool:  # noqa: ARG002
        """Return False: a bucket has no end."""
        return False

    def room(self, needed: int) -> str:
        """Name what is needed."""
        return f"about {human_bytes(needed)}"

    def committed(self, run: Callable[[], str]) -> type[Any]:
        """Return the class that writes the marker."""
        place = self

        class CommittedWithChecksums(CreatedOrHeard, ocp.path.atomicity.CommitFileTemporaryPath):
            async def finalize(self) -> None:
                self.require_created()
                name = self.get_final().name
                if name.isdigit():  # and not a part of a checkpoint
                    await asyncio.to_thread(place._write_manifest, name, run())
                await super().finalize()

        return CommittedWithChecksums

    def _write_manifest(self, name: str, run: str) -> None:
        files = {
            each: (stored.size, stored.sums)
            for each, stored in self._bucket.find(name).items()
            if each not in _AT_THE_END
        }
        text = manifest_text(files, algorithm="the bucket's", updates=int(name), run=run)
        self._bucket.write(f"{name}/{CHECKSUMS}", text.encode())

    def kept_text(self, name: str) -> str | None:
        """Read a small object."""
        try:
            return self._bucket.read(name).decode().strip()
        except FileNotFoundError:
            return None

    def keep_text(self, name: str, text: str) -> None:
        """Write a small object."""
        self._bucket.write(name, f"{text}\n".encode())

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot list {self.path}: {error.strerror}\nfix: {self.fix}"
            ) from error
