"""Make XLA write its programs to a folder, and collect them when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from moe_shard.errors import UserError
from moe_shard.lowering.sources import BEFORE_SUFFIX, HLO_SUFFIX, file_before, read_text
from moe_shard.watching.startup import sitecustomize as startup

_ENTRY = "\nENTRY "
_END = "\n}"
# What a report needs; the other files that XLA writes would fill a disk.
_MEMORY = ("-memory-usage-report.txt", "-buffer-assignment.txt")
_NEEDED = (HLO_SUFFIX, BEFORE_SUFFIX, *_MEMORY)
_ALSO_WITHOUT_PYTHON = "0"
"""The folder name, instead of a process id, of processes that do not run Python."""
CACHE = "JAX_ENABLE_COMPILATION_CACHE"


class Dumps:
    """Provide a temporary folder for dumps, and find the folders of the program's own.

    The temporary folder is removed when the block ends. A program with its own `--xla_dump_to` is
    read there, and nothing of it is removed.
    """

    def __enter__(self) -> Dumps:
        # XLA splits its flags at spaces.
        place = None if len(tempfile.gettempdir().split()) == 1 else "/tmp"
        try:
            self.folder = Path(tempfile.mkdtemp(prefix="moe-shard-watch-", dir=place))
        except OSError as error:
            raise UserError(
                f"no temporary folder for XLA's dumps: {error.strerror}\n"
                "fix: TMPDIR=FOLDER, one that can be written to"
            ) from error
        self._started = time.time_ns()
        self._seen: dict[Path, tuple[int, int]] = {}
        self._done: dict[Path, tuple[int, int]] = {}
        self._read: set[Path] = set()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Twice: a process that outlives the command may still be writing.
        for _ in range(2):
            shutil.rmtree(self.folder, ignore_errors=True)

    def environment(self, given: Mapping[str, str], *, keep_cache: bool) -> dict[str, str]:
        """Return the environment in which a program dumps what it compiles.

        Args:
            given: the environment that it would have.
            keep_cache: leave jax's persistent compilation cache on, although programs from it have
                no text before optimization, or none at all.

        Raises:
            UserError: its own flags send the dumps to a place that cannot be read.
        """
        flags = given.get("XLA_FLAGS", "")
        made = {
            **given,
            "XLA_FLAGS": startup.with_added(flags, str(self.folder), _ALSO_WITHOUT_PYTHON),
            startup.FOLDER: str(self.folder),
            "PYTHONPATH": os.pathsep.join(
                [str(Path(startup.__file__).parent), *filter(None, [given.get("PYTHONPATH")])]
            ),
        }
        if not keep_cache:
            made[CACHE] = "false"
        for theirs in self._theirs():
            if theirs.name == "-" or ":/" in str(theirs):
                raise UserError(
                    "XLA_FLAGS: --xla_dump_to is not a folder that can be read\n"
                    "fix: --xla_dump_to=FOLDER, or leave it out"
                )
        return made

    def whole(self, *, final: bool = False) -> Iterator[Path]:
        """Yield the optimized programs that are new and completely written, oldest first.

        XLA writes a file in place: one that is still changing, or does not end as a program ends,
        is left for a later call.

        Args:
            final: nothing will be written any more, so yield all files.
        """
        found = []
        for path in self._files():
            try:
                stat = path.stat()
            except OSError:
                continue
            state = (stat.st_size, stat.st_mtime_ns)
            if self._done.get(path) == state:
                continue
            if final or self._seen.get(path) == state:
                found.append((stat.st_mtime_ns, path, state))
            self._seen[path] = state
        for _, path, state in sorted(found):
            if final or _is_whole(path):
                self._done[path] = state
                yield path
                self._discard(path)

    def _theirs(self) -> list[Path]:
        listed = self.folder / startup.ELSEWHERE
        if not listed.is_file():
            return []
        return [Path(line) for line in sorted(set(listed.read_text().splitlines()))]

    def _files(self) -> Iterator[Path]:
        for folder in _folders(self.folder):
            for path in _entries(folder):
                if path.name.endswith(HLO_SUFFIX):
                    yield path
                elif not path.is_dir() and (not path.name.endswith(_NEEDED) or self._is_late(path)):
                    path.unlink(missing_ok=True)
        for folder in self._theirs():
            for path in _entries(folder):
                if path.name.endswith(HLO_SUFFIX) and _changed(path) >= self._started:
                    yield path

    def _discard(self, path: Path) -> None:
        """Remove the files of a program that has been read, if the folder is the watch's own."""
        if path.parent.parent != self.folder:
            return
        memory = (path.with_name(path.stem + suffix) for suffix in _MEMORY)
        for each in (path, *memory, file_before(path)):
            if each is not None:
                each.unlink(missing_ok=True)
        self._done.pop(path, None)
        self._seen.pop(path, None)
        self._read.add(path.with_name(path.stem))

    def _is_late(self, path: Path) -> bool:
        """Return whether a memory file belongs to a program that was read and removed."""
        return any(
            path.name.endswith(suffix)
            and path.with_name(path.name.removesuffix(suffix)) in self._read
            for suffix in _MEMORY
        )


def _is_whole(path: Path) -> bool:
    """Return whether a text begins and ends as a program does; the entry comes last."""
    try:
        text = read_text(path)
    except UserError:
        return False  # cut inside a character
    return text.startswith("HloModule") and _ENTRY in text and text.rstrip().endswith(_END)


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
