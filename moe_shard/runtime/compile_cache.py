"""Keep compiled programs for later processes, in jax's persistent compilation cache.

An entry is found by the program, the compiler, its options and the devices. The names of scopes and
parameters and the lines of source count as part of the program here, unlike by jax's default:
reports are read from them, and a program that differs in nothing else would be reported in the
words of the one that was kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from moe_shard.errors import first_line
from moe_shard.files import cache_folder, write_text
from moe_shard.units import human_bytes

MAX_BYTES = 4 * 10**9
"""Size of the folder from which on jax drops the entries that were not used for longest."""

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_OFF = 'jax_cache_dir=""'
_HIT = "/jax/compilation_cache/cache_hits"
_KEPT = "/jax/compilation_cache/cache_misses"  # jax records it where it has written an entry
_PROBLEM = r"Error (reading|writing) persistent compilation cache entry|Cache value for key"
_WARNINGS_KEPT = 1000
_ANSWER_SECONDS = 20.0
"""How long the server of a cache in a bucket may take to answer at the start."""
_own: set[str] = set()
"""Folders that jax has from here."""


@dataclass(frozen=True)
class CompileCache:
    """Describe where this process keeps compiled programs.

    Attributes:
        folder: the folder, or the address of one (gs://...); None: nothing is kept.
        notes: one line each on what a person may want to change.
    """

    folder: Path | str | None
    notes: tuple[str, ...] = ()

    def words(self, counted: Counted) -> str:
        """Write what became of one compilation, to stand after its time; empty without a cache."""
        if self.folder is None or not (counted.found or counted.kept):
            return ""
        what = "from" if counted.found and not counted.kept else "kept for the next start in"
        if isinstance(self.folder, str):
            return f" ({what} {self.folder})"
        with suppress(RuntimeError):  # there is no home
            home = Path.home()
            if self.folder.is_relative_to(home):
                place = f"~/{self.folder.relative_to(home)}"
                return f" ({what} {place}, {human_bytes(_size(self.folder))})"
        return f" ({what} {self.folder}, {human_bytes(_size(self.folder))})"


def start_compile_cache(directory: str) -> CompileCache:
    """Make jax keep what it compiles; call it once the devices have started.

    A folder that jax has from elsewhere (JAX_COMPILATION_CACHE_DIR) stays, with its settings.

    Args:
        directory: `jax_cache_dir`: a folder, "auto" for the user's cache folder, "" for none.
    """
    if not _setting("jax_enable_compilation_cache"):
        return CompileCache(None)
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)  # see above
    _listen()
    # Processes on CPUs meet within 30 s of each other or fail (gloo).
    apart = jax.process_count() > 1 and jax.default_backend() == "cpu"
    given = _setting("jax_compilation_cache_dir")
    if given and given not in _own:
        if unreached := _why_unreached(given):
            # jax would wait for as long at each program, without a word.
            return _use(None, f"no compilation cache: {_VARIABLE}={given}: {unreached}")
        note = f"{_VARIABLE}: a start fails where one process finds its program and another not"
        return CompileCache(_place(given), (note,) if apart else ())
    if not directory:
        return _use(None)
    if apart:
        note = f"no compilation cache ({_OFF}): several processes on CPUs must compile together"
        return _use(None, note)
    try:
        folder = cache_folder() / "jax" if directory == "auto" else Path(directory).expanduser()
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else first_line(error)
        return _use(
            None,
            f"no compilation cache: {directory}: {why}; jax_cache_dir=FOLDER names another, "
            f"{_OFF} none",
        )
    _forget_old_warnings(folder)
    return _use(folder)


def _why_unreached(place: str) -> str:
    """Return why the cache of an address (gs://...) cannot be asked; empty for one that can."""
    if isinstance(_place(place), Path):
        return ""
    found = [f"no answer within {_ANSWER_SECONDS:.0f} s"]

    def ask() -> None:
        try:
            epath.Path(place).exists()
            found.append("")
        except Exception as error:  # whatever the packages of clouds raise
            found.append(first_line(error)[:160])

    asking = threading.Thread(target=ask, daemon=True, name="moe-shard-cache")
    asking.start()
    asking.join(_ANSWER_SECONDS)
    return found[-1]


def _place(given: str) -> Path | str:
    """Return the folder that jax is given, or the address as it is."""
    local = given.removeprefix("file://")
    return given if "://" in local else Path(local)


def _setting(name: str) -> Any:
    return getattr(jax.config, name)


def _use(folder: Path | None, *notes: str) -> CompileCache:
    name = None if folder is None else str(folder)
    if _setting("jax_compilation_cache_dir") != name:
        if name is not None:
            _own.add(name)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
        _set_folder(name)
    return CompileCache(folder, notes)


@dataclass
class Counted:
    """Count what the cache did for one thread.

    Attributes:
        found: programs that were read.
        kept: programs that were compiled and written.
    """

    found: int = 0
    kept: int = 0


_thread = threading.local()


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_listener(_count)


def _count(event: str, **_: Any) -> None:
    counted: Counted | None = getattr(_thread, "counted", None)
    if counted is not None:
        counted.found += event == _HIT
        counted.kept += event == _KEPT


@contextmanager
def count_cached() -> Iterator[Counted]:
    """Count the programs that this thread finds or keeps while the block runs."""
    before = getattr(_thread, "counted", None)
    _thread.counted = Counted()
    try:
        yield _thread.counted
    finally:
        _thread.counted = before


@contextmanager
def without_cache() -> Iterator[None]:
    """Compile without the cache while the block runs."""
    folder = _setting("jax_compilation_cache_dir")
    _set_folder(None)
    try:
        yield
    finally:
        _set_folder(folder)


def _set_folder(name: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", name)
    compilation_cache.reset_cache()


@contextmanager
def cache_problems(say: Callable[[str], None]) -> Iterator[None]:
    """Write jax's warnings about the cache as one line while the block runs, not as warnings.

    A damaged entry, or a full disk, costs the time to compile and nothing else.

    Args:
        say: receives the first such line.
    """
    told: list[str] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=_PROBLEM, category=UserWarning)
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            text = str(message)
            if not re.match(_PROBLEM, text):
                others(message, category, filename, lineno, file, line)
                return
            folder = _setting("jax_compilation_cache_dir")
            done = _removed(folder, text) if folder in _own else "compiled anew"
            if not told:
                told.append(text)
                say(f"compilation cache {folder}: {text.splitlines()[0][:160]}: {done}")

        warnings.showwarning = show
        yield


def _removed(folder: str, problem: str) -> str:
    """Remove the entries that cannot be read, as jax writes over none; return what was done.

    Args:
        folder: a folder that is ours.
        problem: jax's warning, which names the program.
    """
    read = re.match(r"Error reading persistent compilation cache entry for '([\w<>.]+)'", problem)
    if read is None:
        return "it is not kept"
    for path in Path(folder).glob(f"{read[1]}-*-cache"):
        with suppress(OSError):
            path.unlink()
    return "removed and compiled anew"


def program_key(lowered: jax.stages.Lowered, options: object) -> str:
    """Name a program, its names and lines of source included, before it is compiled."""
    text = lowered.as_text(debug_info=True)
    about = f"{jax.__version__} {version('jaxlib')} {options}"
    return hashlib.sha256(f"{about}\n{text}".encode()).hexdigest()


def keep_warnings(key: str, lines: list[str]) -> None:
    """Keep the partitioner's warnings beside a program: who reads that compiles nothing.

    Args:
        key: the result of `program_key`.
        lines: the warnings.
    """
    if path := _warnings_path(key):
        with suppress(OSError):
            write_text(path, json.dumps(lines))


def kept_warnings(key: str) -> list[str] | None:
    """Return the warnings kept for a program; None where there are none of it.

    Args:
        key: the result of `program_key`.
    """
    path = _warnings_path(key)
    if path is None:
        return None
    try:
        lines = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return lines if isinstance(lines, list) and all(isinstance(x, str) for x in lines) else None


def _warnings_path(key: str) -> Path | None:
    given = _setting("jax_compilation_cache_dir")
    folder = _place(given) if given else None
    # Beside programs in a bucket none are kept: they are said to be unknown.
    return folder / f"{key}-partitioner.json" if isinstance(folder, Path) else None


def _forget_old_warnings(folder: Path) -> None:
    """Remove all but the newest files of warnings; jax's own files it bounds itself."""
    with suppress(OSError):
        kept = sorted(folder.glob("*-partitioner.json"), key=lambda path: path.stat().st_mtime)
        for path in kept[:-_WARNINGS_KEPT]:
            path.unlink(missing_ok=True)


def _size(folder: Path) -> int:
    """Add up a folder's files; another process may remove some meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(place) / name).stat().st_size
    return total
