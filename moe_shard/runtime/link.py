"""Connect the processes of a run by sockets of their own, on which a death is seen at once.

Process 0 listens at the coordinator's address (`Hub`), every process keeps one connection to it
(`greet`), and jax's coordination service, which only hears of a death after 100 s and then ends
the process with a C++ dump, is reached through the same port (`serve_jax`): the near side of that
path stays open when process 0 dies, so that jax notices nothing before this process has ended in
order. Messages are JSON, one a line. A machine that vanished is found by TCP keepalive, which needs
no answer from Python: a process that compiles for an hour is not taken for dead.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from moe_shard.errors import UserError

Message = dict[str, Any]

REACH_SECONDS = 2.0
"""How long a process that ends before all have come tries to tell those that start beside it."""
_ANSWER_SECONDS = 30.0
"""How long a process may take to say at which step it is; a thread of its own answers."""
_CONNECT_SECONDS = 30.0
_LINE = 65_536


class Hub:
    """Be the process 0 at which the others meet, and pass messages on to all of them.

    It decides what needs one decision: who has come, who is gone, and the step to stop at.

    Args:
        listener: the listening socket, at the coordinator's address.
        count: number of processes.
        jax_port: port of this host at which jax's coordination service will listen.
    """

    def __init__(self, listener: socket.socket, count: int, jax_port: int) -> None:
        self._listener, self._count, self._jax_port = listener, count, jax_port
        self._lock = threading.RLock()
        self._members: dict[int, socket.socket] = {}
        self._names: dict[int, str] = {}
        self._left: set[int] = set()
        self._everyone_left = threading.Event()
        self._complete = threading.Event()
        self._asked: Message | None = None
        self._proposed = False
        self._passed: dict[int, int | None] = {}
        self._ending = False
        _thread(self._accept)

    def attach(self) -> socket.socket:
        """Connect this process itself, and return its end."""
        near, far = socket.socketpair()
        self._register(near, 0, who())
        return far

    def missing(self) -> str:
        """Say which processes have not come."""
        with self._lock:
            missing = [str(i) for i in range(self._count) if i not in self._members]
        shown = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
        return f"process {shown} of {self._count}"

    def give_up(self, what: str) -> None:
        """End all that have come, for a reason."""
        with self._lock:
            if not self._ending and len(self._members) < self._count:
                self._ending = True
                self._tell({"kind": "gone", "what": what})

    def wait_for_leave(self, seconds: float) -> None:
        """Wait until every other process has said that it leaves."""
        self._everyone_left.wait(seconds)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            _thread(self._greet, connection)

    def _greet(self, connection: socket.socket) -> None:
        """Read a first line, which may be anything: the port is open to others."""
        connection.settimeout(10)
        try:
            first = json.loads(_first_line(connection))
            if first["kind"] == "jax":
                connection.settimeout(None)
                _pipe(connection, _connected(("127.0.0.1", self._jax_port)))
                return
            index, count = int(first["index"]), int(first["count"])
            name = str(first["who"])[:100]
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()
            return
        connection.settimeout(None)
        refused = ""
        with self._lock:
            if count != self._count:
                refused = f"it was told {count} processes, process 0 {self._count}"
            elif index in self._members:
                refused = f"{self._names[index]} is process {index} already"
            elif not 0 < index < self._count:
                refused = "it has no such number"
        if refused:
            _send(connection, {"kind": "refused", "why": refused})
            connection.close()
            return
        self._register(connection, index, name)

    def _register(self, connection: socket.socket, index: int, name: str) -> None:
        prepare(connection)
        with self._lock:
            self._members[index], self._names[index] = connection, name
            if self._proposed:
                _send(connection, {"kind": "propose"})
            if len(self._members) == self._count:
                self._tell({"kind": "all"})
                self._complete.set()
        _thread(self._serve, connection, index)

    def _serve(self, connection: socket.socket, index: int) -> None:
        for message in messages(connection):
            with self._lock:
                self._handle(index, message)
        with self._lock:
            if index not in self._left and not self._ending:
                self._lost(index, "is gone")

    def _handle(self, index: int, message: Message) -> None:
        kind = message["kind"]
        if kind == "ask" and self._asked is None and not self._ending:
            self._asked = message | {"process": index}
            _thread(self._propose)
        elif kind == "passed":
            self._passed[index] = message["updates"]
            self._decide()
        elif kind == "failed" and not self._ending:
            self._ending = True
            self._tell(message | {"process": index, "who": self._names[index]}, but=index)
        elif kind == "leave":
            self._left.add(index)
            if self._left >= set(range(1, self._count)):
                self._everyone_left.set()

    def _decide(self) -> None:
        """Stop after the step that no process has passed, once all have said where they are."""
        assert self._asked is not None, "answers follow a question"
        if set(self._members) - self._left <= set(self._passed):
            reached = list(self._passed.values())
            early = None in reached  # some process has not begun: there is nothing to save
            at = None if early else max(each for each in reached if each is not None) + 1
            self._ending = early
            self._tell(self._asked | {"kind": "stop", "at": at})

    def _propose(self) -> None:
        """Ask all which step they have passed, also those that are just about to come."""
        self._complete.wait(REACH_SECONDS)
        with self._lock:
            self._passed = {}
            self._tell({"kind": "propose"})
            self._proposed = True
        time.sleep(_ANSWER_SECONDS)
        with self._lock:
            silent = sorted(set(self._members) - self._left - set(self._passed))
            if silent and not self._ending:
                self._lost(silent[0], f"has not answered for {_ANSWER_SECONDS:.0f} s")

    def _lost(self, index: int, how: str) -> None:
        self._ending = True
        what = f"process {index} ({self._names[index]}) {how}"
        self._tell({"kind": "gone", "what": what}, but=index)

    def _tell(self, message: Message, but: int | None = None) -> None:
        """Send to all; to this process last, as it may end on it."""
        for index in sorted(self._members, reverse=True):
            if index != but:
                _send(self._members[index], message)


def listen(host: str, port: int, name: str) -> socket.socket:
    """Listen on a port of this host, on all of its addresses.

    Args:
        host: the host as the others call it.
        port: the port.
        name: HOST:PORT as it was given, for the error.

    Raises:
        UserError: the port is taken or may not be used.
    """
    del host  # a name of this host, maybe one behind a load balancer
    for family, place in ((socket.AF_INET6, "::"), (socket.AF_INET, "")):
        try:
            listener = socket.socket(family, socket.SOCK_STREAM)
        except OSError:
            continue
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind((place, port))
            listener.listen(1024)
            return listener
        except OSError as error:
            listener.close()
            if family == socket.AF_INET:
                raise UserError(
                    f"process 0 cannot listen at {name}: {error.strerror}\n"
                    "fix: another port in the coordinator's address, on every process"
                ) from error
    raise UserError(f"process 0 cannot listen at {name}: this host has no network\nfix: one")


def greet(address: tuple[str, int], index: int, count: int) -> socket.socket | str:
    """Connect to process 0, and tell it who this is.

    Args:
        address: host and port at which process 0 listens.
        index: number of this process.
        count: number of processes.

    Returns:
        The connection, or why there is none.
    """
    try:
        connection = socket.create_connection(address, 10)
    except (OSError, UnicodeError) as error:
        return str(getattr(error, "strerror", None) or error)[:100]
    connection.settimeout(None)
    prepare(connection)
    _send(connection, {"kind": "member", "index": index, "count": count, "who": who()})
    return connection


def serve_jax(address: tuple[str, int]) -> str:
    """Lead jax's client in this process to the coordination service of process 0.

    Args:
        address: host and port at which process 0 listens.

    Returns:
        HOST:PORT for jax.
    """
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            near, _ = listener.accept()
            with contextlib.suppress(OSError):
                far = _connected(address)
                prepare(far)
                _send(far, {"kind": "jax"})
                _pipe(near, far, hold_first=True)

    _thread(accept)
    return f"127.0.0.1:{listener.getsockname()[1]}"


def free_port() -> int:
    """Return a port of this host that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def who() -> str:
    """Name this process: its host and process id."""
    return f"{socket.gethostname()}, pid {os.getpid()}"


def prepare(connection: socket.socket) -> None:
    """Set a socket to send at once, and to find a silent machine after about 40 s."""
    if connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 40_000)


def messages(connection: socket.socket) -> Iterator[Message]:
    """Yield what arrives, until the other side is gone."""
    pending = b""
    while True:
        try:
            chunk = connection.recv(_LINE)
        except OSError:
            return
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                return
            yield message


def send_message(connection: socket.socket, message: Message) -> None:
    """Send one message; whoever reads from a connection sees that it is gone."""
    _send(connection, message)


def _send(connection: socket.socket, message: Message) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _connected(address: tuple[str, int]) -> socket.socket:
    connection = socket.create_connection(address, _CONNECT_SECONDS)
    connection.settimeout(None)  # else it would end whatever is silent for as long
    return connection


def _first_line(connection: socket.socket) -> bytes:
    """Read up to the end of a line, and no further: what follows may be jax's."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 1000:
            raise ValueError("no message")
        line += byte
    return line


def _pipe(first: socket.socket, second: socket.socket, *, hold_first: bool = False) -> None:
    """Pass bytes both ways; `hold_first`: leave the first open when the second ends."""

    def pump(source: socket.socket, target: socket.socket, hold: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(_LINE):
                target.sendall(chunk)
        if not hold:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)

    _thread(pump, first, second, False)
    _thread(pump, second, first, hold_first)


def _thread(target: Callable[..., object], *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, daemon=True, name="moe-shard-link").start()
