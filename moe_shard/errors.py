"""Define the exceptions that are shown to a person, and how every command reports them.

A command reports bad input with one to three lines on standard error (what, where, the fix) and
exit code 2. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
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
    try:
        code = main()
        if sys.stdout is not None:  # None where the caller has closed it
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USAGE
    except Finding as finding:
        print(finding, file=sys.stderr)
        code = EXIT_FINDING
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has gone; prevent an error from the flush at exit as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_DONE
    except OSError as error:
        if error.strerror is None:  # raised by a library, not by the system
            raise
        print(f"error: {_described(error)}", file=sys.stderr)
        code = EXIT_USAGE
    sys.exit(code)


_FIXES = {
    errno.ENOSPC: "make room on that disk; the same command goes on from what is there",
    errno.EDQUOT: "make room in that quota; the same command goes on from what is there",
    errno.ENAMETOOLONG: "a shorter name",
}


def _described(error: OSError) -> str:
    """Describe what the system refused: the path, why, and the fix, in two lines."""
    where = f"{str(error.filename)[:100]}: " if error.filename is not None else ""
    fix = _FIXES.get(error.errno or 0, "another path, or the permission or the space that it needs")
    return f"{where}{error.strerror}\nfix: {fix}"
