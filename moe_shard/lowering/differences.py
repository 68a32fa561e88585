"""Compare two lowerings and report in words what changed, never as a difference of texts.

Collectives are added up by stage, pass, kind and mesh axes. Two lowerings are the same if these
sums (counts, bytes, bytes on the wire, number of asynchronous ones), the verdict, the mesh, the
backend and the memory are equal. Order, names, source lines and layouts do not count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from moe_shard.errors import UserError
from moe_shard.lowering.reports import report_from_text
from moe_shard.lowering.shardings import has_names
from moe_shard.lowering.sources import (
    RECORD,
    STANDARD_INPUT,
    dumped_memory,
    module_file,
    read_text,
    record_of,
    recorded_mesh,
)
from moe_shard.units import human_bytes

SumKey = tuple[str, str, str, tuple[str, ...]]
"""Scope, pass, kind, mesh axes."""


@dataclass(frozen=True)
class CollectiveSums:
    """Add up the collectives of one `SumKey`, per step and device.

    Attributes:
        count: executions.
        bytes: output bytes of all executions.
        wire_bytes: bytes that must be sent in all executions.
        asynchronous: executions that other work can overlap.
    """

    count: int = 0
    bytes: int = 0
    wire_bytes: int = 0
    asynchronous: int = 0

    def __add__(self, other: CollectiveSums) -> CollectiveSums:
        return CollectiveSums(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(CollectiveSums))
        )


@dataclass(frozen=True)
class Lowering:
    """Hold what is compared of a lowering.

    Attributes:
        source: the name of what it was read from.
        backend: "cpu", "tpu", "gpu" or "unknown".
        num_devices: devices that run the program.
        mesh: {axis: size}; empty where it is not known.
        verdict: one of `verdict_names.VERDICTS`; None without a mesh.
        sums: the collectives.
        memory: bytes per device by part, or None where it is not known.
    """

    source: str
    backend: str
    num_devices: int
    mesh: dict[str, int]
    verdict: str | None
    sums: dict[SumKey, CollectiveSums]
    memory: dict[str, int] | None

    @property
    def total(self) -> CollectiveSums:
        """Return the sums over all collectives."""
        return sum(self.sums.values(), CollectiveSums())

    @property
    def large_axes(self) -> dict[str, int]:
        """Return the mesh without its axes of size 1, which change nothing."""
        return {axis: size for axis, size in self.mesh.items() if size > 1}

    def to_json(self) -> dict[str, Any]:
        """Return this side of `Diff.to_json`."""
        return {
            "source": self.source,
            "backend": self.backend,
            "num_devices": self.num_devices,
            "mesh": self.mesh,
            "verdict": self.verdict,
            "totals": vars(self.total),
            "memory": self.memory,
        }


@dataclass(frozen=True)
class Change:
    """Pair the different sums of one stage, pass, kind and axes, before and after."""

    key: SumKey
    a: CollectiveSums
    b: CollectiveSums

    @property
    def weight(self) -> int:
        """Return by how many bytes they differ, added or gone."""
        return abs(self.b.bytes - self.a.bytes)

    def __str__(self) -> str:
        _, _, kind, axes = self.key
        name = f"{kind}({', '.join(axes) or 'axis unknown'})"
        if not self.b.count:
            return f"-{self.a.count} {name} {human_bytes(self.a.bytes)}"
        if not self.a.count:
            return f"+{self.b.count} {name} {human_bytes(self.b.bytes)}"
        parts = []
        if self.a.count != self.b.count:
            parts.append(f"{self.a.count} -> {self.b.count}")
        if self.a.bytes != self.b.bytes:
            parts.append(_arrow(self.a.bytes, self.b.bytes))
        elif self.a.wire_bytes != self.b.wire_bytes:
            parts.append(f"on the wire {_arrow(self.a.wire_bytes, self.b.wire_bytes)}")
        if self.a.asynchronous != self.b.asynchronous:
            parts.append(f"asynchronous {self.a.asynchronous} -> {self.b.asynchronous}")
        return f"{name} {', '.join(parts)}"


@dataclass(frozen=True)
class Diff:
    """Hold two lowerings and where they differ, the most bytes first."""

    a: Lowering
    b: Lowering
    changes: tuple[Change, ...]

    @property
    def same(self) -> bool:
        """Return whether nothing that counts differs."""
        plain = ("backend", "num_devices", "large_axes", "verdict")
        return (
            not self.changes
            and all(getattr(self.a, name) == getattr(self.b, name) for name in plain)
            # A text does not include the memory; that is not a difference.
            and (self.a.memory is None or self.b.memory in (None, self.a.memory))
        )

    def lines(self) -> list[str]:
        """Report the difference in words: one line per stage and pass, then the totals."""
        lines = []
        if self.a.backend != self.b.backend or self.a.num_devices != self.b.num_devices:
            lines.append(f"devices: {_devices(self.a)} -> {_devices(self.b)}")
        if self.a.large_axes != self.b.large_axes:
            lines.append(f"mesh: {_mesh(self.a)} -> {_mesh(self.b)}")
        stages: dict[tuple[str, str], list[Change]] = {}
        for change in self.changes:
            stages.setdefault(change.key[:2], []).append(change)
        for (scope, pass_), changes in sorted(
            stages.items(), key=lambda item: -sum(each.weight for each in item[1])
        ):
            where = scope if pass_ in ("unknown", scope) else f"{scope} {pass_}"
            lines.append(f"{where}: {', '.join(map(str, changes))}")
        if self.same:
            return ["the same: collectives, verdict and memory"]
        a, b = self.a.total, self.b.total
        if not self.changes:
            lines.append(f"collectives: the same {a.count}, {human_bytes(a.bytes)}")
        else:
            lines.append(f"total: {a.count} -> {b.count} collectives, {_arrow(a.bytes, b.bytes)}")
        return [*lines, f"verdict: {self._verdict()}", *self._memory()]

    def _verdict(self) -> str:
        a, b = (side.verdict or "unknown (no mesh)" for side in (self.a, self.b))
        return f"{a}, as before" if a == b else f"{a} -> {b}"

    def _memory(self) -> list[str]:
        if self.a.memory is None or self.b.memory is None:
            unknown = [side.source for side in (self.a, self.b) if side.memory is None]
            return [f"memory: not recorded in {' and '.join(unknown)}"]
        parts = [
            f"{key.removesuffix('_bytes')} {_arrow(self.a.memory[key], self.b.memory[key])}"
            for key in self.a.memory
            if key in self.b.memory and self.a.memory[key] != self.b.memory[key]
        ]
        return [f"memory per device: {', '.join(parts) or 'as before'}"]

    def __str__(self) -> str:
        """Return the sources of A and B, then the lines."""
        return "\n".join([f"A: {self.a.source}", f"B: {self.b.source}", *self.lines()])

    def render(self, console: Console) -> None:
        """Print the sources of A and B, then the lines, in color where the console has it."""
        console.print(f"A: {self.a.source}\nB: {self.b.source}", markup=False, soft_wrap=True)
        for line in self.lines():
            name, colon, rest = escape(line).partition(":")
            console.print(f"[bold]{name}[/]{colon}{rest}", soft_wrap=True)

    def to_json(self) -> dict[str, Any]:
        """Return the object of `moe-shard diff --json`; sums are per step and device."""
        return {
            "same": self.same,
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "changes": [
                {
                    **dict(zip(("scope", "pass", "kind"), each.key[:3], strict=True)),
                    "axes": list(each.key[3]),
                    "a": vars(each.a),
                    "b": vars(each.b),
                }
                for each in self.changes
            ],
            "summary": self.lines(),
        }


def compare(a: Lowering, b: Lowering) -> Diff:
    """Compare two lowerings."""
    changes = [
        Change(key, a.sums.get(key, CollectiveSums()), b.sums.get(key, CollectiveSums()))
        for key in {**a.sums, **b.sums}
        if a.sums.get(key, CollectiveSums()) != b.sums.get(key, CollectiveSums())
    ]
    return Diff(a, b, tuple(sorted(changes, key=lambda each: (-each.weight, each.key))))


def load_pair(
    a: str,
    b: str,
    mesh: Mapping[str, int] | None = None,
    mesh_a: Mapping[str, int] | None = None,
    mesh_b: Mapping[str, int] | None = None,
) -> tuple[Lowering, Lowering]:
    """Read two arguments of a command line.

    A mesh that only one of them names is used for both if they have as many devices.

    Args:
        a: a run folder, a dump folder, an HLO file, a `lowering.json`, or "-".
        b: see `a`.
        mesh: {axis: size} in device order, for HLO text whose mesh is not recorded.
        mesh_a: mesh of A alone.
        mesh_b: mesh of B alone.

    Raises:
        UserError: one cannot be read, both are "-", or one records a different mesh than the one
            given for it alone.
    """
    if a == b == STANDARD_INPUT:
        raise UserError("A and B cannot both be standard input\nfix: a file for one of them")
    first, second = with_shared_mesh(_reader(a, mesh_a or mesh), _reader(b, mesh_b or mesh))
    for name, given, side in (("a", mesh_a, first), ("b", mesh_b, second)):
        if given and dict(given) != side.mesh:
            raise UserError(
                f"--mesh-{name}: {side.source} records its mesh, {_mesh(side)}\n"
                f"fix: leave --mesh-{name} out"
            )
    return first, second


def _reader(
    given: str, mesh: Mapping[str, int] | None
) -> Callable[[Mapping[str, int] | None], Lowering]:
    first = cache(lambda: load(given, mesh))
    # Standard input cannot be read a second time.
    return lambda shared: (
        first() if shared is None or given == STANDARD_INPUT else load(given, shared)
    )


def with_shared_mesh(
    read_a: Callable[[Mapping[str, int] | None], Lowering],
    read_b: Callable[[Mapping[str, int] | None], Lowering],
) -> tuple[Lowering, Lowering]:
    """Read two lowerings; a mesh that only one of them names is used for both.

    Args:
        read_a: reads the first with the mesh it is given, or, given None, with what it knows.
        read_b: reads the second in the same way.
    """
    first, second = read_a(None), read_b(None)
    if first.num_devices == second.num_devices:
        if has_names(second.mesh) and not has_names(first.mesh):
            first = read_a(second.mesh)
        elif has_names(first.mesh) and not has_names(second.mesh):
            second = read_b(first.mesh)
    return first, second


def load(given: str, mesh: Mapping[str, int] | None = None) -> Lowering:
    """Read one lowering; a run's folder is read by its `lowering.json`, which includes the memory.

    Args:
        given: see `load_pair`.
        mesh: {axis: size} for HLO text whose mesh is not recorded.

    Raises:
        UserError: it cannot be read, or is neither HLO nor a `lowering.json`.
    """
    folder = Path(given)
    if given != STANDARD_INPUT and (folder / RECORD).is_file():
        return from_json(read_text(folder / RECORD), given)
    path = module_file(given)
    text = read_text(path)
    if text.lstrip()[:1] == "{":
        return from_json(text, given)
    memory = dumped_memory(path)
    report = report_from_text(text, mesh=recorded_mesh(path) or mesh, memory=memory)
    lowering = from_object(report.to_json(), given)
    record = record_of(path)
    if record is not None and report.verdict is not None:
        # The run recorded the memory, and the verdict for its own expert axes.
        known = from_json(read_text(record), given)
        lowering = replace(lowering, verdict=known.verdict, memory=known.memory)
    return lowering


def from_json(text: str, source: str) -> Lowering:
    """Read a `lowering.json`, or what `moe-shard report --json` printed.

    Raises:
        UserError: it is something else.
    """
    try:
        content = json.loads(text)
        return from_object(content, source)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{source} is not a lowering.json: {type(error).__name__}"
            f" {str(error).splitlines()[0][:80]}\n"
            "fix: a run's folder, HLO text, or what moe-shard report --json printed"
        ) from error


def from_object(content: Any, source: str) -> Lowering:
    """Build a lowering from an object of `lowering.json`; raise KeyError or the like otherwise."""
    sums: dict[SumKey, CollectiveSums] = {}
    for each in content["collectives"]:
        axes = tuple(str(axis) for axis in each["axes"])
        key = (str(each["scope"]), str(each["pass"]), str(each["kind"]), axes)
        count = int(each["count"])
        sums[key] = sums.get(key, CollectiveSums()) + CollectiveSums(
            count,
            count * int(each["bytes"]),
            count * int(each["wire_bytes"]),
            count * bool(each["async"]),
        )
    verdict, memory = content["verdict"], content["memory"]
    return Lowering(
        source=source,
        backend=str(content["backend"]),
        num_devices=int(content["num_devices"]),
        mesh={str(axis): int(size) for axis, size in content["mesh"].items()},
        verdict=None if verdict is None else str(verdict),
        sums=sums,
        memory=None if memory is None else {str(k): int(v) for k, v in memory.items()},
    )


def _arrow(a: int, b: int) -> str:
    before, after = human_bytes(a), human_bytes(b)
    if before == after:
        before, after = f"{a:,}", f"{b:,} B"
    return f"{before} -> {after}{_percent(a, b)}"


def _percent(a: int, b: int) -> str:
    change = round(100 * (b - a) / a) if a else 0
    return f" ({change:+d} %)" if change else ""


def _devices(side: Lowering) -> str:
    return f"{side.num_devices} ({side.backend})"


def _mesh(side: Lowering) -> str:
    sizes = ", ".join(f"{axis} {size}" for axis, size in side.large_axes.items())
    return sizes or ("one device" if side.mesh else "unknown")
