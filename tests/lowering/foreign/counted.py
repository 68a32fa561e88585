"""Count what a program moves over one mesh axis, with XLA's own parser and none of moe_shard.

A collective is followed backwards, through whatever hands on data as it is (copies, slices,
converts, fusions of those, loops and their carries), to the ENTRY parameters that it moves. That
tells gathered weights. Everything computed is a leaf, told by its op_name; what it is for, the
program's construction says (test_programs_counted.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.xla_parser import hlo

KINDS = {
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
}
HANDED_ON = KINDS - {"all-reduce", "reduce-scatter", "ragged-all-to-all"} | {
    *("convert", "copy", "bitcast", "bitcast-convert", "reshape", "transpose", "concatenate"),
    *("broadcast", "select", "optimization-barrier", "pad", "slice", "dynamic-slice"),
    *("dynamic-update-slice", "async-start", "async-update", "async-done"),
}
FIRST_OPERAND_ONLY = {"slice", "dynamic-slice", "pad"}


@dataclass(frozen=True)
class Counted:
    """One collective over the axis.

    Attributes:
        times: executions in one step.
        shape: its first output's, such as "f32[8,128,96]".
        parameters: paths of the parameters that it moves.
        computed: opcode and op_name of whatever else it moves.
    """

    kind: str
    times: int
    shape: str
    op_name: str
    parameters: frozenset[str]
    computed: frozenset[str]


class Program:
    """A text, and the ways through it."""

    def __init__(self, text: str) -> None:
        module = hlo.hlo_module_from_text(text)
        self.by_name: dict[str, Any] = {}
        self.computation: dict[str, str] = {}
        self.text: dict[str, str] = {}
        self.callers: dict[str, list[tuple[str, str]]] = {}
        self.entry = str(re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)[1])  # type: ignore[index]
        inside = re.compile(
            r"^(?:ENTRY )?%?([\w.\-]+) .*\{$(?:\n .*)*?\n +ROOT %?([\w.\-]+) =", re.M
        )
        self.roots: dict[str, str] = dict(inside.findall(text))
        for computation in module.computations():
            for each in computation.instructions():
                name, printed = each.name, each.to_string()
                self.by_name[name] = each
                self.text[name] = printed
                self.computation[name] = computation.name
                called = r"(calls|body|condition|to_apply)=%?([\w.\-]+)"
                for how, callee in re.findall(called, printed):
                    self.callers.setdefault(callee, []).append((name, how))
                if branches := re.search(r"branch_computations=\{(.*?)\}", printed):
                    for callee in re.findall(r"[\w.\-]+", branches[1]):
                        self.callers.setdefault(callee, []).append((name, "branch"))

    def opcode(self, name: str) -> str:
        right = re.sub(r"\{[^{}]*\}", "", self.text[name].split(" = ", 1)[1])
        return str(re.search(r" ([a-z][\w\-]*)\(", " " + right)[1])  # type: ignore[index]

    def op_name(self, name: str) -> str:
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.text[name])
        return found[1].replace("\\", "") if found else ""

    def times(self, computation: str, untold_trips: int) -> int:
        """Executions of a computation in one step; TPUs do not print a loop's trip count."""
        if computation == self.entry:
            return 1
        total = 0
        for caller, how in self.callers.get(computation, ()):
            times = self.times(self.computation[caller], untold_trips)
            if how == "body":
                trips = re.search(r'known_trip_count.*?n"?:"?(\d+)', self.text[caller])
                times *= int(trips[1]) if trips else untold_trips
            total += 0 if how == "condition" else times
        return total

    def sources(
        self, name: str, index: int | None = None, seen: set[tuple[str, int | None]] | None = None
    ) -> frozenset[str]:
        """Return "P:path" of each parameter handed on to here, "C:opcode op_name" of the rest."""
        seen = set() if seen is None else seen
        if (name, index) in seen:
            return frozenset()
        seen.add((name, index))
        opcode = self.opcode(name)
        operands = [each.name for each in self.by_name[name].operands()]

        def of(name: str, index: int | None = None) -> frozenset[str]:
            return self.sources(name, index, seen)

        def of_all(names: list[str]) -> frozenset[str]:
            return frozenset().union(*map(of, names))

        if opcode == "parameter":
            return self._outside(name, index, of)
        if opcode == "get-tuple-element":
            at = int(re.search(r"index=(\d+)", self.text[name])[1])  # type: ignore[index]
            return of(operands[0], None if self.opcode(operands[0]) == "all-to-all" else at)
        if opcode == "tuple":
            return of_all(operands) if index is None else of(operands[index])
        if opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", self.text[name])
            assert body
            return of(operands[0], index) | of(self.roots[body[1]], index)
        called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", self.text[name])
        if opcode in ("fusion", "call", "async-start") and called and called[1] in self.roots:
            return of(self.roots[called[1]], index)
        base = re.sub("-(start|done|update)$", "", opcode)
        if opcode.endswith(("-done", "-update")) and base not in ("all-reduce", "reduce-scatter"):
            return of(operands[0], index)
        if base not in HANDED_ON:
            return frozenset({f"C:{opcode} {self.op_name(name)}"})
        if base == "all-gather" and index is not None and len(operands) > 1:
            operands = [operands[index % len(operands)]]
        if base in FIRST_OPERAND_ONLY:
            operands = operands[:1]
        if base == "dynamic-update-slice":
            operands = operands[:2]
        return of_all(operands)

    def _outside(self, name: str, index: int | None, of: Any) -> frozenset[str]:
        """What a computation's parameter is where the computation is called."""
        computation = self.computation[name]
        if computation == self.entry:
            return frozenset({f"P:{self.op_name(name)}"})
        number = int(re.search(r"parameter\((\d+)\)", self.text[name])[1])  # type: ignore[index]
        found: frozenset[str] = frozenset()
        for caller, how in self.callers.get(computation, ()):
            operands = [each.name for each in self.by_name[caller].operands()]
            if how == "body":
                found |= of(operands[0], index) | of(self.roots[computation], index)
            elif how == "calls" or self.opcode(caller) == "call":
                found |= of(operands[number], index)
        return found


def collectives_over(
    text: str, mesh: Mapping[str, int], axis: str, untold_trips: int = 1
) -> Iterator[Counted]:
    """Yield what moves over an axis, each once: a TPU's clones of one collective are skipped.

    Args:
        mesh: {axis: size}, devices in order.
        untold_trips: of loops whose trip count the text does not say.
    """
    program = Program(text)
    for name, printed in program.text.items():
        kind = program.opcode(name).removesuffix("-start")
        where = program.computation[name]
        if kind not in KINDS or where.startswith("async_wrapped"):
            continue  # an async-start has the latter too
        if axis not in axes_of(printed, mesh):
            continue
        operands = [each.name for each in program.by_name[name].operands()]
        sources = frozenset().union(*map(program.sources, operands))
        clone = all(
            each.startswith("C:custom-call") for each in sources
        )  # of a buffer that is there
        if "async_collective_fusion" in where or (clone and kind != "all-reduce"):
            continue
        yield Counted(
            kind,
            program.times(where, untold_trips),
            str(re.search(r"\w+\[[\d,]*\]", printed.split(" = ", 1)[1])[0]),  # type: ignore[index]
            program.op_name(name),
            frozenset(each[2:] for each in sources if each.startswith("P:")),
            frozenset(each[2:] for each in sources if each.startswith("C:")),
        )


def axes_of(printed: str, mesh: Mapping[str, int]) -> set[str]:
    """Return the axes along which a group's devices differ."""
    shape = tuple(mesh.values())
    axes: set[str] = set()
    for group in groups_of(printed, int(np.prod(shape))):
        places = np.array(np.unravel_index(group, shape))
        axes |= {name for name, row in zip(mesh, places, strict=True) if len(set(row)) > 1}
    return axes


def groups_of(printed: str, devices: int) -> list[list[int]]:
    """Read replica groups in each of XLA's spellings, or a permutation's pairs."""

    def numbers(text: str) -> list[int]:
        return [int(each) for each in text.split(",")]

    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", printed):
        return [numbers(each) for each in re.findall(r"\{([\d,]+)\}", found[1])]
    iota = r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search("replica_groups=" + iota, printed):
        ids = np.arange(devices).reshape(numbers(found[2]))
        if found[3]:
            ids = ids.transpose(numbers(found[3]))
        return list(ids.reshape(numbers(found[1])).tolist())
    named = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{(.*?)\}"
    if found := re.search(named, printed):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        ids = np.arange(devices)
        if found[2]:
            ids = ids.reshape(numbers(found[2])).transpose(numbers(found[3]))
        ids = ids.reshape([int(size) for size in sizes.values()])
        over = [list(sizes).index(each) for each in re.findall(r"'(\w+)'", found[4])]
        kept = [at for at in range(len(sizes)) if at not in over]
        size = int(np.prod([ids.shape[at] for at in over]))
        return list(ids.transpose(kept + over).reshape(-1, size).tolist())
    assert "replica_groups={}" in printed, printed[:300]
    return [list(range(devices))]
