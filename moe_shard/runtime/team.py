"""Keep the processes of a run together: they start, stop and end as one.

    with Team() as team:                # from here on a signal is answered, and a death is seen
        ...                             # load jax, and `meet`: every process is there
        ...                             # compile, restore: a stop ends the process at once
        with team.running(first_step):
            for step in ...:
                ...                     # dispatch the step
                if team.reached(step + 1):
                    ...                 # on every process after the same step: save, and leave

Anything may ask for a stop: a signal to any process, or code (`team.ask("the disk is full")`).
Process 0 then asks each process which step it has passed, and all stop after the next one.

What it costs: without a request, `reached` takes a lock and compares two numbers, under a
microsecond, and nothing is sent; with one, each process waits once for two messages through process
0. No device takes part, so the next step is dispatched while the last one runs. A signal wakes a
thread, which Python lets run while the main thread compiles or waits for devices in C++.

When a process is gone or has failed, every other one writes a line and ends within seconds, from a
thread: a process that waits inside a collective cannot be interrupted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from moe_shard.errors import EXIT_INTERRUPTED, EXIT_STOPPED, Finding, UserError, first_line
from moe_shard.runtime.ending import End, show
from moe_shard.runtime.launch import Launch, find_launch, split_address
from moe_shard.runtime.link import (
    REACH_SECONDS,
    Hub,
    Message,
    free_port,
    greet,
    listen,
    messages,
    send_message,
    serve_jax,
)
from moe_shard.runtime.signals import watch_signals

JOIN_SECONDS = 50.0
"""How long processes wait for each other, where no configuration says."""
_JOIN_KEY = "jax_distributed_initialization_timeout"
_FIRST_NOTE, _NEXT_NOTE = 5.0, 25.0
"""Seconds after which waiting is said, and said again."""
_AFTER_ALL = 2**62
"""Updates of a process that has made its last step: nobody stops there any more."""
_CONTINUES = "the same command continues"
_GRACE = 3.0
"""Seconds in which a process may end by an error of its own before it ends with another's."""


class Team:
    """Hold this process's place among the processes of a run, which may be this one alone.

    Args:
        signals: answer SIGINT and SIGTERM; only the main thread may.

    Attributes:
        join_seconds: how long processes wait for each other at the start.

    Raises:
        UserError: the environment describes no possible set of processes.
    """

    def __init__(self, *, signals: bool = True) -> None:
        self.launch: Launch | None = find_launch(os.environ)
        self.join_seconds = JOIN_SECONDS
        # Known before it greets the others, for the lines of one that is stopped earlier.
        self.index, self.count = 0, 1
        if self.launch and self.launch.count and self.launch.index is not None:
            self.index, self.count = self.launch.index, self.launch.count
        self.reason: str | None = None
        self.code = EXIT_STOPPED
        self.jax_address: str | None = None
        self._signals = signals
        self._address = ""
        self._greeted_at: float | None = None
        self._unreached: str | None = None
        self._changed = threading.Condition()
        self._proposed = False
        self._stop_at: int | None = None
        self._passed: int | None = None
        self._hub: Hub | None = None
        self._link: socket.socket | None = None
        self._linked = threading.Event()
        self._all_here = threading.Event()
        self._leaving = False
        self._refused: str | None = None
        self._other_ended = False
        self._end = End()
        self._interrupts = 0
        self._restore: Callable[[], None] = lambda: None

    def __enter__(self) -> Team:
        if self._signals and threading.current_thread() is threading.main_thread():
            self._restore = watch_signals(self._signalled)
        try:
            if self.launch and self.launch.address and self.launch.count:
                assert self.launch.index is not None, "it comes with the count"
                self._greet(self.launch.address, self.launch.index, self.launch.count)
        except BaseException as error:
            self._fail(error)
            self._restore()
            raise
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            self._fail(error)
        else:
            self.leave()
        self._restore()

    # Start.

    def _greet(self, address: str, index: int, count: int) -> None:
        """Begin to connect to the others, without waiting: whoever has done so is missed."""
        if count == 1 or self._greeted_at is not None:
            return
        host, port = split_address(address, "the coordinator's address")
        self._address, self.index, self.count = address, index, count
        self._greeted_at = time.monotonic()
        if index == 0:
            jax_port = free_port()
            self._hub = Hub(listen(host, port, address), count, jax_port)
            self.jax_address = f"127.0.0.1:{jax_port}"
            self._link = self._hub.attach()
            self._linked.set()
        else:
            self.jax_address = serve_jax((host, port))
        threading.Thread(target=self._listen, daemon=True, name="moe-shard-team").start()

    def meet(self, address: str, index: int, count: int) -> None:
        """Connect to the other processes, and wait until all are there.

        One that does not come in time may have been killed before it could connect: this process
        then ends so that it may be started again.

        Args:
            address: HOST:PORT of process 0.
            index: number of this process.
            count: number of processes.

        Raises:
            UserError: process 0 refuses this process, or is something else.
        """
        self._greet(address, index, count)
        if count == 1:
            return
        assert self._greeted_at is not None, "it has greeted the others"
        due = _FIRST_NOTE
        while not self._all_here.wait(0.1):
            waited = time.monotonic() - self._greeted_at
            if waited > self.join_seconds:
                self._give_up(waited)
            if waited > due and (missing := self._missing()):
                due += _NEXT_NOTE
                self._end.note(f"{missing}; gives up after {self.join_seconds:.0f} s ({_JOIN_KEY})")
        if self._refused:
            raise UserError(
                f"process 0 at {address} refuses process {index} of {count}: {self._refused}\n"
                "fix: each process its own number, and the same count on all"
            )

    def _missing(self) -> str:
        """Say for whom this process waits; nothing where process 0 says it."""
        if self._hub:
            return f"waiting for {self._hub.missing()}"
        if self._link is None:
            return (
                f"process {self.index} cannot reach the coordinator, process 0 at {self._address}: "
                f"{self._unreached or 'no answer'}"
            )
        return ""

    def _give_up(self, waited: float) -> None:
        within = f"within {self.join_seconds:.0f} s ({_JOIN_KEY})"
        if self._hub:
            self._hub.give_up(f"{self._hub.missing()} did not come {within}")
        elif self._link is None:
            why = self._unreached or "no answer"
            self._lost(f"process 0 could not be reached at {self._address} {within}: {why}")
        elif waited > self.join_seconds + 5:  # it says more, if it is this run's
            raise UserError(
                f"what listens at {self._address} does not answer as process 0 of this run does\n"
                "fix: the coordinator's address must be that of this run's process 0"
            )

    # Stop.

    def ask(self, reason: str, code: int = EXIT_STOPPED) -> None:
        """Ask all processes to stop after the same step; the first request counts.

        Any thread may call this, at any time. Before the first step, and while some process has
        not begun, all end at once: there is nothing to save.

        Args:
            reason: completes "stopped by".
            code: exit code of the run.
        """
        if self.count > 1:
            self._linked.wait(REACH_SECONDS)
        if self._link is not None:
            send_message(self._link, {"kind": "ask", "reason": reason, "code": code})
            return
        with self._changed:
            if self.reason is None and self._passed != _AFTER_ALL:
                at = None if self._passed is None else self._passed + 1
                self._stop({"reason": reason, "code": code, "process": self.index, "at": at})

    @contextlib.contextmanager
    def running(self, updates: int) -> Iterator[None]:
        """Begin the steps: in this block a stop waits for the end of a step.

        Args:
            updates: number of updates made before.
        """
        self._pass(updates)
        yield
        self._pass(_AFTER_ALL)

    def reached(self, updates: int) -> bool:
        """Return whether to stop now, the same on every process; call it once after each step.

        Args:
            updates: number of updates made or dispatched.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._proposed or self._stop_at is not None)
            if self._stop_at is not None and updates >= self._stop_at:
                return True
            self._passed = updates
            return False

    def _pass(self, updates: int) -> None:
        with self._changed:
            # A request of the start ends the process; wait for that rather than begin.
            self._changed.wait_for(lambda: not self._proposed or self._stop_at is not None)
            self._passed = updates

    def _stop(self, message: Message) -> None:
        """Accept a decision; `at` is None where some process has not begun."""
        asked = f" to process {message['process']}" if self.count > 1 else ""
        with self._changed:
            self.reason, self.code = message["reason"] + asked, message["code"]
            self._stop_at = message["at"]
            self._changed.notify_all()
        if self._stop_at is None:
            self._end(
                f"{self._me()}stopped by {self.reason} before the first step: nothing to save; "
                f"{_CONTINUES}",
                self.code,
            )

    def _signalled(self, number: int) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                self._end(f"{self._me()}ended by a second Ctrl-C, nothing saved", EXIT_INTERRUPTED)
        self.ask(name)

    # End.

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Tell the other processes of an error at once, before this one waits for them.

        With several processes an error within the block ends the process: closing what is open
        would wait for the others.
        """
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def leave(self) -> None:
        """Wait for the others at the end of the run, so that none takes another for dead."""
        if self._link is None or self._leaving:
            return
        jax = sys.modules.get("jax")
        if jax is not None:
            jax.distributed.shutdown()
        self._leaving = True
        send_message(self._link, {"kind": "leave"})
        if self._hub:
            self._hub.wait_for_leave(60)

    def _fail(self, error: BaseException) -> None:
        if self.count == 1 or self._leaving or isinstance(error, GeneratorExit | SystemExit):
            return
        own = isinstance(error, UserError | Finding)
        # What is wrong here may follow from another process, whose news are on the way.
        time.sleep(1.0 if own else _GRACE)
        if self._link is None:
            return
        code, lines = show(error)
        send_message(
            self._link,
            {"kind": "failed", "text": first_line(error), "code": code, "own": own},
        )
        time.sleep(0.2)
        self._end(lines, code)

    def _listen(self) -> None:
        while self._link is None:
            found = greet(split_address(self._address, "it"), self.index, self.count)
            if isinstance(found, str):
                self._unreached = found
                time.sleep(0.2)
            else:
                self._link = found
                self._linked.set()
        for message in messages(self._link):
            self._handle(message)
        if not self._leaving and not self._other_ended:
            self._lost("process 0 is gone")

    def _handle(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "all":
            self._all_here.set()
        elif kind == "refused":
            self._refused = message["why"]
            self._leaving = True
            self._all_here.set()
        elif kind == "propose":
            with self._changed:
                self._proposed = True
                passed = self._passed
            assert self._link is not None, "a message came"
            send_message(self._link, {"kind": "passed", "updates": passed})
        elif kind == "stop":
            self._stop(message)
        elif kind == "gone":
            self._lost(message["what"])
        elif kind == "failed":
            self._other_ended = True  # process 0 may leave before this one, which waits a little
            threading.Thread(target=self._other_failed, args=(message,), daemon=True).start()

    def _lost(self, what: str) -> None:
        self._end(f"{self._me()}ends: {what}; {_CONTINUES}", EXIT_STOPPED)

    def _other_failed(self, message: Message) -> None:
        if message["own"]:
            time.sleep(_GRACE)  # the same may be wrong here, and is then said in full
        self._end(
            f"{self._me()}ends: process {message['process']} ({message['who']}) failed: "
            f"{message['text']}",
            message["code"],
        )

    def _me(self) -> str:
        return f"process {self.index}: " if self.count > 1 else ""
