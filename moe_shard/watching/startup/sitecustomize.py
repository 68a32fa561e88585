"""Keep XLA's dump flags in every Python process of a program that is being watched.

`moe-shard watch` puts this folder on the program's PYTHONPATH. Flags in XLA_FLAGS alone are not
enough: a program that assigns XLA_FLAGS loses them, one that reads XLA_FLAGS may behave
differently, and two processes would write files of the same names into one folder. So the flags are
only where XLA reads them, in the C environment, with a folder for each process; `os.environ` shows
what the program itself was given or has assigned. This file imports nothing of the package, because
another Python may run it.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    _Text: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

FOLDER = "MOE_SHARD_WATCH_FOLDER"
"""The environment variable that names the watch's folder."""
ELSEWHERE = "elsewhere"
"""A file in it: the folders, a line each, to which a program's own flags send its dumps."""

_NAME = "XLA_FLAGS"
_AS_TEXT = "--xla_dump_hlo_as_text"
_OWN_DUMP = re.compile(r"--xla_dump_to[= ]\s*[\"']?([^\s\"']+)")


def added_flags(folder: str, pid: object) -> str:
    """Return the flags with which a process dumps its programs as text."""
    return f"--xla_dump_to={os.path.join(folder, str(pid))} {_AS_TEXT}"


def without_added(flags: str, folder: str) -> str:
    """Remove what an earlier `with_added` of this watch has put at the end of the flags."""
    at = flags.find(f"--xla_dump_to={folder}{os.sep}")
    return flags if at < 0 else flags[:at].rstrip(" ")


def with_added(flags: str, folder: str, pid: object) -> str:
    """Add the dump flags to a program's own, which come first and are kept.

    A program that already dumps keeps its folder; the folder is recorded for the watch.

    Args:
        flags: XLA_FLAGS as the program has it: flags, or the name of a file that holds them.
        folder: the watch's folder.
        pid: the name of the process's own folder in it.
    """
    own = flags
    if flags.strip() and not flags.lstrip().startswith("-"):
        try:
            with open(flags.strip(), encoding="utf-8") as file:
                own = " ".join(file.read().split())
        except (OSError, ValueError):
            return flags  # XLA reports it
    dumps = _OWN_DUMP.findall(own)
    if not dumps:
        return f"{own} {added_flags(folder, pid)}".lstrip()
    with open(os.path.join(folder, ELSEWHERE), "a", encoding="utf-8") as file:
        file.write(os.path.abspath(dumps[-1]) + "\n")
    return own if _AS_TEXT in own.split() else f"{own} {_AS_TEXT}"


def _keep(folder: str) -> None:
    """Wrap how `os.environ` writes to the C environment."""
    put, unset = os.putenv, os.unsetenv

    def is_flags(key: _Text) -> bool:
        return os.fsdecode(key) == _NAME

    def set_flags(value: str) -> None:
        with suppress(OSError):  # the watch and its folder may be gone already
            value = with_added(value, folder, os.getpid())
        put(_NAME, value)

    def putenv(key: _Text, value: _Text) -> None:
        if is_flags(key):
            set_flags(os.fsdecode(value))
        else:
            put(key, value)

    def unsetenv(key: _Text) -> None:
        if is_flags(key):
            set_flags("")
        else:
            unset(key)

    os.putenv, os.unsetenv = putenv, unsetenv
    own = without_added(os.environ.get(_NAME, ""), folder)
    if own:
        os.environ[_NAME] = own
    else:
        os.environ.pop(_NAME, None)
        set_flags("")
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: set_flags(os.environ.get(_NAME, "")))


def _give_way() -> None:
    """Run the sitecustomize that this one hides, if there is one."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    # Before 3.9 `os.environ` kept references to these functions; there the flags stay visible.
    if os.environ.get(FOLDER) and sys.version_info >= (3, 9):
        _keep(os.environ[FOLDER])
    _give_way()
