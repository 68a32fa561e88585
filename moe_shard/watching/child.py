"""Run a program in place of this process: its input, output, signals and exit code."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Mapping, Sequence

PASSED_ON = frozenset(
    {
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
    }
)
"""Signals that are meant for the program, whichever of the two processes receives them."""
ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
"""Those of them that ask the program to end."""
NOT_FOUND = 127
NOT_EXECUTABLE = 126
# Python ignores these two; a program must not inherit that.
_NOT_INHERITED = (signal.SIGPIPE, signal.SIGXFSZ)


class CannotStart(Exception):
    """Report that the program could not be started; `code` is a shell's exit code for that."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def hold_signals() -> set[int]:
    """Hold back the signals that are meant for the program, in this and all later threads.

    Returns:
        The signals that were held back already, which a program should inherit.
    """
    # Inherited as "ignored", the end of the program would never be reported.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON | {signal.SIGCHLD}))


class Child:
    """Run a program with this process's standard input and output, in its process group.

    Args:
        command: the program and its arguments.
        environment: environment of the program.
        mask: the result of `hold_signals`.
        stdout_to_stderr: whether its standard output is sent to standard error.

    Attributes:
        interrupted: whether a signal requested its end while it ran.

    Raises:
        CannotStart: there is no such program, or it is not executable.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        mask: set[int],
        *,
        stdout_to_stderr: bool,
    ) -> None:
        _flush()
        actions = [(os.POSIX_SPAWN_DUP2, 2, 1)] if stdout_to_stderr else []
        try:
            self.pid = os.posix_spawnp(
                command[0],
                list(command),
                environment,
                file_actions=actions,
                setsigmask=mask,
                setsigdef=_NOT_INHERITED,
            )
        except OSError as error:
            found = not isinstance(error, FileNotFoundError)
            code = NOT_EXECUTABLE if found else NOT_FOUND
            raise CannotStart(f"{command[0]}: {error.strerror}", code) from error
        self.interrupted = False
        self._lock = threading.Lock()
        self._status: int | None = None

    def wait(self) -> int:
        """Wait until the program ends, and pass signals on until then.

        A signal from the terminal (Ctrl-C) has reached the program already.

        Returns:
            Its exit code, or -N where signal N has ended it.
        """
        while True:
            number, from_terminal = _next_signal()
            if number == signal.SIGCHLD:
                with self._lock:
                    pid, status = os.waitpid(self.pid, os.WNOHANG)
                    if pid:
                        self._status = os.waitstatus_to_exitcode(status)
                        return self._status
                continue
            self.interrupted |= number in ENDING
            if not from_terminal:
                self.send(number)

    def send(self, number: int) -> None:
        """Send a signal, unless the program has ended."""
        with self._lock:
            if self._status is None:
                os.kill(self.pid, number)


def interrupted(seconds: float) -> bool:
    """Wait up to `seconds` for one of `PASSED_ON`; all of them must be blocked."""
    if not hasattr(signal, "sigtimedwait"):
        threading.Event().wait(seconds)
        return bool(signal.sigpending() & PASSED_ON)
    return signal.sigtimedwait(PASSED_ON, seconds) is not None


def _next_signal() -> tuple[int, bool]:
    """Return the next blocked signal, and whether the terminal sent it to the whole group."""
    watched = PASSED_ON | {signal.SIGCHLD}
    if hasattr(signal, "sigwaitinfo"):
        found = signal.sigwaitinfo(watched)
        # Codes above 0 come from the kernel: keys at a terminal, a closed terminal.
        return found.si_signo, found.si_code > 0
    number = signal.sigwait(watched)
    return number, number in (signal.SIGINT, signal.SIGQUIT) and _in_foreground()


def _in_foreground() -> bool:
    for descriptor in range(3):
        try:
            return os.tcgetpgrp(descriptor) == os.getpgrp()
        except OSError:
            continue
    return False


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None where the caller has closed it
            stream.flush()


def end_as(code: int) -> int:
    """End this process by the signal that ended its program, so that a caller sees no difference.

    Args:
        code: the result of `Child.wait`.

    Returns:
        The code, where no signal ended it or this process survives the signal.
    """
    if code >= 0:
        return code
    number = -code
    _flush()
    # The program may have left a core dump: do not overwrite it with a second one.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    return 128 + number
