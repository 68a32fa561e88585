"""Define the exceptions that are shown to a person, and how every command reports them.

A command reports bad input with one to three lines on standard error (what, where, the fix) and
exit code 2. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_DONE = 0
EXIT_FINDING = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75
"""Stopped early; the same command continues."""
EXIT_INTERRUPTED = 130


class Finding(Exception):
    """Report that a requested check does not hold, in at most three lines."""


class UserError(ValueError):
    """Report bad input: what is wrong, where, and the fix, in at most three lines."""


def first_line(error: BaseException, limit: int = 160) -> str:
    """Return the first line of an exception, cut to `limit` characters; else its type."""
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:limit]


class CommandParser(argparse.ArgumentParser):
    """Report bad usage in one line instead of the whole usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}; try --help")


def run_command(main: Callable[[], int]) -> None:
    """Run a command's `main` and end the process with its exit code.

    Args:
        main: returns the exit code. Raises `UserError` for bad input (exit code 2) and may raise
            `Finding` (exit code 1).
    """
    _open_streams()
    try:
        code = main()
        if sys.stdout is not None:  # None where the caller has closed it
            sys.stdout.flush()
    except UserError as error:
        _complain(f"error: {error}")
        code = EXIT_USAGE
    except Finding as finding:
        _complain(str(finding))
        code = EXIT_FINDING
    except KeyboardInterrupt:
        _complain("interrupted")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has gone.
        _discard(1)
        code = EXIT_DONE
    except OSError as error:
        if error.strerror is None:  # raised by a library, not by the system
            raise
        _complain(f"error: {_described(error)}")
        code = EXIT_USAGE
    # What is left in its buffer would fail again when Python ends, with another exit code.
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _discard(1)
    sys.exit(code)


def _open_streams() -> None:
    """Open /dev/null where the caller has closed input or output; print any character somehow.

    Else the next files to be opened would get these numbers, and whatever writes to descriptor 2
    would write into them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
            kind = io.BufferedReader if number == 0 else io.BufferedWriter
            setattr(sys, name, io.TextIOWrapper(kind(raw), "utf-8", "replace"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _complain(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # nobody can be told; the exit code tells
        _discard(2)


def _discard(number: int) -> None:
    """Send what is still written to a descriptor nowhere."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


_FIXES = {
    errno.ENOSPC: "make room on that disk; the same command goes on from what is there",
    errno.EDQUOT: "make room in that quota; the same command goes on from what is there",
    errno.ENAMETOOLONG: "a shorter name",
}


def _described(error: OSError) -> str:
    """Describe what the system refused: the path, why, and the fix, in two lines."""
    where = f"{str(error.filename)[:100]}: " if error.filename is not None else ""
    if error.errno == errno.ENOENT and not where:
        where = "the current folder: "  # the one thing that is opened without a name
    fix = _FIXES.get(error.errno or 0, "another path, or the permission or the space that it needs")
    return f"{where}{error.strerror}\nfix: {fix}"
