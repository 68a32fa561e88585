"""The partitioner's "involuntary full rematerialization" warnings, as data.

When the SPMD partitioner finds no direct way from one layout of a tensor to another it replicates
the tensor on every device and cuts it again. It says so on the process's standard error, from C++,
in a line of 700 characters; nothing of it reaches Python. `remat_lines` takes those lines out of
file descriptor 2 while a program compiles, `parse` reads one, and `summarize` makes one readable
line of all that stand in one stage of the model.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import select
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_shard.errors import UserError
from moe_shard.lowering.hlo import HloParseError, Instruction, Module
from moe_shard.lowering.op_names import classify
from moe_shard.lowering.shapes import shape_bytes
from moe_shard.units import human_bytes

_MARK = "Involuntary full rematerialization"
_SHARDINGS = re.compile(
    r"from sharding (\{.*?\}|@?mesh.*?) to (\{.*?\}|@?mesh.*?) (?=efficiently|without)"
)
_OPERATION = re.compile(r"HLO operation:? %?([\w.\-]+) = (\S+|\(.*?\)) ([a-z][a-z0-9\-]*)\(")
_OP_NAME = re.compile(r'\bop_name="((?:[^"\\]|\\.)*)"')
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_OLDER_SOURCE = re.compile(r'\bsource_file="([^"]*)" source_line=(\d+)')
_TILES = re.compile(r"devices=\[([\d,]+)\]")
_LAYOUT = re.compile(r"\{[\d,]*(?::[^}]*)?\}$")
_CHUNK = 1 << 16

_capturing = threading.Lock()


@dataclass(frozen=True)
class RematWarning:
    """A tensor that the partitioner replicates in order to re-shard it.

    Attributes:
        from_sharding: the layout it has, as XLA spells it.
        to_sharding: the layout it is wanted in.
        shape: one device's part of it before the change, e.g. "f32[4,128,128]".
        bytes: bytes of that part.
        replicated_bytes: bytes of the whole tensor, which every device holds for a while.
        op: opcode of the operation that has the layout.
        op_name: the path of the traced program; "" when XLA has lost it.
        scope: the stage of the model, see `op_names.SCOPES`; or "other".
        pass_: "forward", "backward", "optimizer" or "unknown".
        source: "file:line", or None where it is not known.
    """

    from_sharding: str
    to_sharding: str
    shape: str
    bytes: int
    replicated_bytes: int
    op: str
    op_name: str
    scope: str
    pass_: str
    source: str | None


def parse(line: str, module: Module | None = None) -> RematWarning | None:
    """Read one line of the partitioner.

    Args:
        line: the line as it stands on standard error.
        module: the compiled module, whose tables give the source line.

    Returns:
        The warning; None for any other line, and for one in a wording this reader does not know.
    """
    shardings, operation = _SHARDINGS.search(line), _OPERATION.search(line)
    if _MARK not in line or shardings is None or operation is None:
        return None
    shape = _LAYOUT.sub("", operation[2])
    try:
        size = shape_bytes(shape)
    except UserError:
        return None
    found = _OP_NAME.search(line)
    op_name = re.sub(r"\\(.)", r"\1", found[1]) if found else ""
    scope, pass_ = classify(op_name)
    return RematWarning(
        from_sharding=shardings[1],
        to_sharding=shardings[2],
        shape=shape,
        bytes=size,
        replicated_bytes=size * _parts(shardings[1], shape),
        op=operation[3],
        op_name=op_name,
        scope=scope,
        pass_=pass_,
        source=_source(line, module),
    )


def _parts(sharding: str, shape: str) -> int:
    """Into how many different parts a sharding cuts a tensor; 1 where it cannot be told."""
    tiles = _TILES.search(sharding)
    if tiles is None:
        return 1
    dims = re.search(r"\[([\d,]*)\]", shape)
    rank = len([size for size in dims[1].split(",") if size]) if dims else 0
    # Further entries count devices that hold the same part.
    return math.prod([int(count) for count in tiles[1].split(",")][:rank])


def _source(line: str, module: Module | None) -> str | None:
    if older := _OLDER_SOURCE.search(line):
        return f"{older[1]}:{older[2]}"
    frame = _FRAME.search(line)
    if frame is None or module is None:
        return None
    try:
        return module.source(Instruction("", "", "", "", f"stack_frame_id={frame[1]}", 0))
    except HloParseError:
        return None  # the frame was of another module


def count_lines(lines: Sequence[str]) -> int:
    """How many of the lines are such warnings, known wording or not."""
    return sum(_MARK in line for line in lines)


def summarize(lines: Sequence[str], module: Module | None = None) -> list[str]:
    """One readable line for each stage of the model, the costliest first.

    Args:
        lines: what `remat_lines` collected.
        module: the compiled module, for source lines.
    """
    scopes: dict[str, list[RematWarning]] = {}
    unread = 0
    for line in lines:
        if _MARK not in line:
            continue
        warning = parse(line, module)
        if warning is None:
            unread += 1
        else:
            scopes.setdefault(warning.scope, []).append(warning)
    told = sorted(scopes.items(), key=lambda item: -sum(each.bytes for each in item[1]))
    sentences = [_sentence(scope, warnings) for scope, warnings in told]
    if unread:
        sentences.append(
            f"involuntary full rematerialization: {unread} that the compiler words in a way this "
            "reader does not know"
        )
    return sentences


def _sentence(scope: str, warnings: Sequence[RematWarning]) -> str:
    largest = max(warnings, key=lambda each: each.bytes)
    distinct = len({each.shape for each in warnings})
    size = f"{'largest ' if distinct > 1 else ''}{largest.shape}, {human_bytes(largest.bytes)}"
    where = "outside the named stages" if scope == "other" else f"in {scope}"
    source = f" at {largest.source}" if largest.source else ""
    these = "this tensor to re-shard it" if len(warnings) == 1 else "these tensors to re-shard them"
    return (
        f"involuntary full rematerialization: {len(warnings)} {where} ({size}){source}: "
        f"the partitioner replicates {these}; a constraint between the two layouts avoids it"
    )


@contextlib.contextmanager
def remat_lines() -> Iterator[list[str]]:
    """Collect the partitioner's warnings from file descriptor 2 while the block runs.

    Every other line is passed on to where the descriptor pointed, as soon as it is whole. When the
    block raises, the collected lines follow. Where descriptor 2 is closed, or another block (of
    another thread, or around this one) is collecting already, nothing is collected and nothing is
    changed.

    Returns:
        A list, filled by the end of the block.
    """
    lines: list[str] = []
    if not _capturing.acquire(blocking=False):
        yield lines
        return
    try:
        try:
            original = os.dup(2)
        except OSError:  # closed: C++ cannot say anything either
            yield lines
            return
        with _Tap(original, lines):
            yield lines
    finally:
        _capturing.release()


class _Tap:
    """Descriptor 2 replaced by a pipe, and the thread that reads the pipe."""

    def __init__(self, original: int, lines: list[str]) -> None:
        self._original = original
        self._lines = lines
        # What follows this in the pipe was written after the block, by a child that inherited it.
        self._end = f"\0{uuid.uuid4().hex}\n".encode()
        self._drained = threading.Event()

    def __enter__(self) -> None:
        _flush_stderr()
        readable, self._writable = os.pipe()
        os.dup2(self._writable, 2)
        self._thread = threading.Thread(
            target=self._forward, args=(readable,), name="remat-lines", daemon=True
        )
        self._thread.start()

    def __exit__(self, raised: type[BaseException] | None, *_: object) -> None:
        _flush_stderr()
        os.dup2(self._original, 2)
        # Not end of file, which a child still running would withhold: all before this was read.
        _write(self._writable, self._end)
        os.close(self._writable)
        self._drained.wait()
        if raised is not None:  # nobody will report them
            _write(2, "".join(f"{line}\n" for line in self._lines).encode())

    def _forward(self, readable: int) -> None:
        pending = b""
        try:
            while chunk := os.read(readable, _CHUNK):
                pending += chunk
                if self._end in pending:
                    before, _, pending = pending.partition(self._end)
                    self._take(before)
                    self._drained.set()
                *whole, pending = pending.split(b"\n")
                if whole:
                    self._take(b"\n".join(whole) + b"\n")
            self._take(pending)
        finally:
            self._drained.set()
            os.close(readable)
            os.close(self._original)

    def _take(self, text: bytes) -> None:
        """Keep the partitioner's lines, pass the others on."""
        others = b""
        for line in text.splitlines(keepends=True):
            if _MARK.encode() in line and not self._drained.is_set():
                self._lines.append(line.decode("utf-8", "replace").rstrip("\r\n"))
            else:
                others += line
        _write(self._original, others)


def _flush_stderr() -> None:
    # None under pythonw, closed by a daemon, or an object of a test's own.
    with contextlib.suppress(AttributeError, ValueError, OSError):
        sys.stderr.flush()


def _write(descriptor: int, text: bytes) -> None:
    """Write all of it; a reader that has gone is no reason to end a compilation."""
    while text:
        try:
            text = text[os.write(descriptor, text) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
        except OSError:
            return
