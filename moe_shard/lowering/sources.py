"""Find and read a lowering: HLO text, a dump folder, a run's folder, or standard input."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any, BinaryIO

from moe_shard.errors import UserError
from moe_shard.lowering.op_names import SCOPES

HLO_SUFFIX = "after_optimizations.txt"
BEFORE_SUFFIX = "before_optimizations.txt"
RECORD = "lowering.json"
STANDARD_INPUT = "-"
_LARGEST = 4 << 30
_CHUNK = 16 << 20

# The main memory, which XLA calls color 0.
_TOTAL = re.compile(r"^Memory Space: .*\(color=0\)\nTotal bytes: (\d+)", re.M)
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*):$", re.M)


def module_file(given: str) -> Path | None:
    """Find the file that an argument names; in a folder the largest module, which is the step.

    Prints on standard error which of a folder's modules it is.

    Args:
        given: a file, a folder of dumps or of a run, or "-".

    Returns:
        The file, not yet opened; None for standard input.

    Raises:
        UserError: a folder that holds no HLO.
    """
    if given == STANDARD_INPUT:
        return None
    path = Path(given)
    if not path.is_dir():
        return path
    folder = path / "hlo" if (path / "hlo").is_dir() else path
    found = sorted(folder.glob(f"*{HLO_SUFFIX}"), key=lambda file: file.stat().st_size)
    if not found:
        raise UserError(
            f"{folder} holds no HLO (*{HLO_SUFFIX}): dump it with dump_hlo=true, or with"
            " XLA_FLAGS=--xla_dump_to=DIR"
        )
    chosen = found[-1]
    print(f"reading {chosen.name}, the largest of {len(found)} modules", file=sys.stderr)
    return chosen


def read_text(path: Path | None) -> str:
    """Read the text of a file, or of standard input for None.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    name = "standard input" if path is None else str(path)
    try:
        if path is None:
            return _whole(sys.stdin.buffer, name).decode("utf-8")
        with _opened(path) as file:
            return _whole(file, name).decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not HLO text: it is not UTF-8") from error


def _opened(path: Path) -> BinaryIO:
    """Open a file; a pipe into which nobody writes is empty, and is not waited for.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(descriptor, True)
    return open(descriptor, "rb")


def _whole(file: BinaryIO, name: str) -> bytes:
    """Read a file to its end, unless it has none, as a device.

    Raises:
        UserError: it is no text, or more than a program's.
        OSError: it cannot be read.
    """
    chunks: list[bytes] = []
    left = _LARGEST
    while chunk := file.read(_CHUNK):
        left -= len(chunk)
        if left < 0:
            raise UserError(f"{name} is not HLO text: it is larger than {_LARGEST >> 30} GiB")
        if len(chunk) == _CHUNK and b"\0" in chunk:
            raise UserError(f"{name} is not HLO text: it has zero bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def dumped_memory(path: Path | None) -> dict[str, int] | None:
    """Read the bytes per device of a dumped module from the files that XLA wrote next to it.

    The memory usage report has the total, constants included; the buffer assignment, where there is
    one, has the parts: arguments, outputs and temporaries.

    Args:
        path: path of the module; None for standard input.

    Returns:
        As `memory.memory_from_compiled`, as far as it is known; None where there is no such file.
    """
    if path is None:
        return None
    usage = _read_if_there(path.with_name(f"{path.stem}-memory-usage-report.txt"))
    total = _TOTAL.search(usage)
    if total is None:
        return None
    memory = _parts(_read_if_there(path.with_name(f"{path.stem}-buffer-assignment.txt")))
    return {**memory, "total_bytes": int(total[1])}


def _read_if_there(path: Path) -> str:
    try:
        with _opened(path) as file:
            return _whole(file, path.name).decode("utf-8", "replace")
    except (OSError, UserError):
        return ""


def _parts(assignment: str) -> dict[str, int]:
    """Add up the allocations of a device's main memory by purpose."""
    memory = dict.fromkeys(("argument_bytes", "output_bytes", "temp_bytes", "alias_bytes"), 0)
    found = [(int(each[1]), each[2]) for each in _ALLOCATION.finditer(assignment)]
    for size, purpose in found:
        if re.search(r"\bcolor [1-9]", purpose):
            continue  # on the chip, or on the host
        is_argument, is_output = "parameter" in purpose, "maybe-live-out" in purpose
        memory["argument_bytes"] += size * is_argument
        memory["output_bytes"] += size * is_output
        memory["alias_bytes"] += size * (is_argument and is_output)
        memory["temp_bytes"] += size * ("preallocated-temp" in purpose and not is_output)
    return memory if found else {}


def record_of(path: Path | None) -> Path | None:
    """Return the `lowering.json` of the run that wrote a module, where there is one."""
    if path is None:
        return None
    inside = path.parent.name in ("hlo", "profile")
    folders = [path.parent, *([path.parent.parent] if inside else [])]
    return next((folder / RECORD for folder in folders if (folder / RECORD).is_file()), None)


def recorded_mesh(path: Path | None) -> dict[str, int] | None:
    """Return the mesh of the run that wrote a module; None where it is not recorded.

    Raises:
        UserError: there is a record, but it has no mesh.
    """
    record = record_of(path)
    if record is None:
        return None
    try:
        content: Any = json.loads(read_text(record))
        return {str(axis): int(size) for axis, size in content["mesh"].items()}
    except RecursionError as error:
        raise UserError(f"{record} nests too deeply\nfix: --mesh axis=size,...") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{record} has no mesh\nfix: --mesh axis=size,...") from error


def before_optimization(path: Path | None) -> str | None:
    """Read the text before optimization that XLA dumped next to an optimized module.

    Args:
        path: path of the optimized module; None for standard input.
    """
    before = None if path is None else file_before(path)
    return None if before is None else _read_if_there(before) or None


def file_before(path: Path) -> Path | None:
    """Return the file of the module before optimization that is next to an optimized one.

    Args:
        path: of the optimized module. Its name continues the other's, as in
            `module_0003.jit_step.cpu_after_optimizations.txt`, `...sm_9.0a_gpu_after_...` or
            `...jit_step.cl_123.after_...`.
    """
    if not path.name.endswith(HLO_SUFFIX):
        return None
    name = path.name.removesuffix(HLO_SUFFIX)
    ends = [at + 1 for at, letter in enumerate(name) if letter == "."]
    # The longest prefix: one process may dump programs of several backends under similar names.
    found = (path.with_name(f"{name[:end]}{BEFORE_SUFFIX}") for end in reversed(ends))
    return next((each for each in found if each.is_file()), None)


def parse_stages(text: str) -> dict[str, str]:
    """Parse `--stages` as a person types it: `wi_0=experts,gate=router`.

    Raises:
        UserError: it cannot be parsed, or there is no such stage.
    """
    stages: dict[str, str] = {}
    for item in text.split(","):
        word, equals, stage = (part.strip() for part in item.partition("="))
        if not word or not equals:
            raise UserError(f"--stages: cannot read {item!r}; write it as wi_0=experts,gate=router")
        if stage not in SCOPES:
            raise UserError(
                f"--stages: there is no stage {stage!r}\nfix: one of {', '.join(SCOPES)}"
            )
        stages[word] = stage
    return stages


_DIGITS, _SHOWN = 10, 60
"""Digits that no axis has, and characters of a text that an error shows."""


def parse_mesh(text: str, option: str = "--mesh") -> dict[str, int]:
    """Parse a mesh as a person types it: `data=1,fsdp=1,expert=8`.

    Args:
        text: the text as typed.
        option: the option that it was given to.

    Raises:
        UserError: it cannot be parsed, or repeats an axis.
    """
    mesh: dict[str, int] = {}
    for item in text.split(","):
        axis, _, size = (part.strip() for part in item.partition("="))
        is_size = size.isdecimal() and len(size) < _DIGITS and int(size) > 0
        if not axis or axis in mesh or not is_size:
            found = item if len(item) <= _SHOWN else f"{item[:_SHOWN]}..."
            raise UserError(f"{option}: cannot read {found!r}; write it as data=1,fsdp=1,expert=8")
        mesh[axis] = int(size)
    return mesh


def parse_expert_axes(text: str | None, mesh: dict[str, int] | None = None) -> list[str] | None:
    """Parse --expert-axes; return None where it is not given.

    Args:
        text: the text as typed.
        mesh: the mesh of --mesh, if given.

    Raises:
        UserError: the mesh has no such axis.
    """
    if text is None:
        return None
    axes = [axis.strip() for axis in text.split(",")]
    unknown = [axis for axis in axes if mesh is not None and axis not in mesh]
    if mesh is not None and unknown:
        raise UserError(
            f"--expert-axes: the mesh has no axis {', '.join(unknown)}; it has {', '.join(mesh)}"
        )
    return axes
