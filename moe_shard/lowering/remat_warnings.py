"""Parse the partitioner's "involuntary full rematerialization" warnings.

When the SPMD partitioner cannot convert directly from one layout of a tensor to another, it
replicates the tensor on every device and slices it again. It reports that on the process's standard
error from C++, in a line of 700 characters that does not reach Python. The caller who compiles a
program collects those lines from standard error by their `MARK`, `parse` reads one, and `summarize`
writes one readable line per stage of the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from moe_shard.errors import UserError
from moe_shard.lowering.hlo import HloParseError, Instruction, Module
from moe_shard.lowering.op_names import classify
from moe_shard.lowering.shapes import shape_bytes
from moe_shard.units import human_bytes

MARK = "Involuntary full rematerialization"
"""Text that each of these lines contains, whatever the rest of its wording."""

_SHARDINGS = re.compile(
    r"from sharding (\{.*?\}|@?mesh.*?) to (\{.*?\}|@?mesh.*?) (?=efficiently|without)"
)
_OPERATION = re.compile(r"HLO operation:? %?([\w.\-]+) = (\S+|\(.*?\)) ([a-z][a-z0-9\-]*)\(")
_OP_NAME = re.compile(r'\bop_name="((?:[^"\\]|\\.)*)"')
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_OLDER_SOURCE = re.compile(r'\bsource_file="([^"]*)" source_line=(\d+)')
_TILES = re.compile(r"devices=\[([\d,]+)\]")
_LAYOUT = re.compile(r"\{[\d,]*(?::[^}]*)?\}$")


@dataclass(frozen=True)
class RematWarning:
    """Describe a tensor that the partitioner replicates in order to re-shard it.

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
        line: the line of standard error.
        module: the compiled module, whose tables give the source line.

    Returns:
        The warning; None for any other line, and for one in an unknown wording.
    """
    shardings, operation = _SHARDINGS.search(line), _OPERATION.search(line)
    if MARK not in line or shardings is None or operation is None:
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
    """Count the different parts into which a sharding cuts a tensor; 1 where unknown."""
    tiles = _TILES.search(sharding)
    if tiles is None:
        return 1
    dims = re.search(r"\[([\d,]*)\]", shape)
    rank = len([size for size in dims[1].split(",") if size]) if dims else 0
    # Further entries count devices that hold the same shard.
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
        return None  # the frame belongs to another module


def with_source(line: str, module: Module) -> str:
    """Write the source into a line instead of its stack frame's number in this module.

    A program that is stored and loaded again numbers its stack frames anew.

    Args:
        line: the line of standard error.
        module: the compiled module that the partitioner was making.
    """
    source = _source(line, module)
    if source is None:
        return line
    file, _, number = source.rpartition(":")
    return _FRAME.sub(lambda _: f'source_file="{file}" source_line={number}', line)


def count_lines(lines: Sequence[str]) -> int:
    """Count the lines that are such warnings, whether or not their wording is known."""
    return sum(MARK in line for line in lines)


def summarize(lines: Sequence[str], module: Module | None = None) -> list[str]:
    """Write one readable line for each stage of the model, the most expensive first.

    Args:
        lines: lines of standard error while the program compiled; those without the mark are
            ignored.
        module: the compiled module, for source lines.
    """
    scopes: dict[str, list[RematWarning]] = {}
    unread = 0
    for line in lines:
        if MARK not in line:
            continue
        warning = parse(line, module)
        if warning is None:
            unread += 1
        else:
            scopes.setdefault(warning.scope, []).append(warning)
    ordered = sorted(scopes.items(), key=lambda item: -sum(each.bytes for each in item[1]))
    sentences = [_sentence(scope, warnings) for scope, warnings in ordered]
    if unread:
        sentences.append(
            f"involuntary full rematerialization: {unread} in a wording of the compiler that is "
            "unknown here"
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
