"""Tell whether a checkpoint can fit on its disk, and why one could not be written."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from moe_shard.errors import first_line
from moe_shard.units import human_bytes

_OS_ERROR = re.compile(r"os_error_code='(\d+)'")
_LEAST_OF_LAST, _LEAST_OF_STATE = 0.9, 0.5
"""Stored arrays are compressed: what a checkpoint needs at least, of the last one's and of the
state's bytes."""


def hide_late_callbacks() -> None:
    """Hide the tracebacks of writes that end after the first of a save has failed.

    tensorstore tells each to the event loop of the save, which has failed or is closed by then;
    Python shows that as an error nobody handles, once for every array. The failure itself is
    raised.
    """
    if not isinstance(sys.unraisablehook, _WithoutLateCallbacks):
        sys.unraisablehook = _WithoutLateCallbacks(sys.unraisablehook)
        logging.getLogger("asyncio").addFilter(
            lambda record: "exception was never retrieved" not in record.getMessage()
        )


class _WithoutLateCallbacks:
    def __init__(self, shown: Callable[[sys.UnraisableHookArgs], object]) -> None:
        self._shown = shown

    def __call__(self, unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self._shown(unraisable)


def free_bytes(folder: Path) -> int | None:
    """Return the bytes that may still be written to a folder's disk; None if unknown."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def why_not_writable(folder: Path) -> str:
    """Return why nothing can be written to a folder; empty if something can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        return why_not_written(error)
    return ""


def least_bytes(state: Any, last: int | None) -> int:
    """Return the bytes without which a checkpoint cannot fit.

    Args:
        state: the arrays, each whole.
        last: size of the checkpoint before it; None if unknown.
    """
    if last is not None:
        return int(last * _LEAST_OF_LAST)
    return int(sum(leaf.nbytes for leaf in jax.tree.leaves(state)) * _LEAST_OF_STATE)


def why_not_written(error: BaseException) -> str:
    """Return what the system said, which tensorstore wraps in a paragraph of its own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = _OS_ERROR.search(str(error))
    return os.strerror(int(found.group(1))) if found else first_line(error, 120)


def room_words(free: int | None, needed: int) -> str:
    """Put free and needed bytes into words."""
    if free is None:
        return f"needs about {human_bytes(needed)}"
    return f"{human_bytes(free)} free, needs about {human_bytes(needed)}"
