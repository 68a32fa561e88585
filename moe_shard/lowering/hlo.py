"""Parse HLO text into computations; the text format is known here and in `instructions` only.

One pass finds the name and the opcode of every instruction and checks that the text is complete:
every `%name` that is used is defined, every computation is closed and has one root, the tables at
the top have no gap. A file that lost lines is refused, because a table of collectives from half a
program would look like a correct one. The rest of an instruction (operands, attributes) is parsed
on first use, in `instructions`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from moe_shard.lowering.instructions import (
    INSTRUCTION,
    Call,
    Computation,
    HloParseError,
    Instruction,
    bad_line,
    integer_of,
    open_brackets,
)
from moe_shard.lowering.short_form import with_percent_signs
from moe_shard.lowering.stack_frames import TABLES, StackFrames

__all__ = [
    "Call",
    "Computation",
    "HloParseError",
    "Instruction",
    "Module",
    "bad_line",
    "parse_module",
]

_MODULE = re.compile(r"HloModule ([^\s,]+)")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) (?:\(.*\) -> .* )?\{(?: ?//.*)?$")
_CLOSE = re.compile(r"\}(?:, [^\n]*)?(?: ?//.*)?$")
_TABLE_ROW = re.compile(r'(\d+) (".*"|\{.*\})$')
# Custom calls that the partitioner removes: sharding constraints, and the boundaries of shard_map.
_FOR_THE_PARTITIONER = re.compile(r'custom_call_target="(?:Sharding|SPMD\w+|xla\.sdy\.[\w.]+)"')
_COMPILERS_OWN = ("fusion", "all-", "reduce-scatter", "collective-", "ragged-all-to-all")


@dataclass
class Module:
    """Hold a whole program.

    `replica_count * num_partitions` is the number of devices that run it.
    """

    name: str
    is_scheduled: bool
    num_partitions: int
    replica_count: int
    computations: dict[str, Computation]
    entry: Computation
    tables: dict[str, list[str]]
    _frames: StackFrames | None = field(default=None, repr=False)

    @property
    def num_devices(self) -> int:
        """Return how many devices run this program."""
        return self.num_partitions * self.replica_count

    @property
    def is_before_optimization(self) -> bool:
        """Return whether no compiler has optimized it yet, so that its collectives are missing.

        Compilers leave a schedule. Without one, the text is taken as unoptimized if it has custom
        calls for the partitioner, or if nothing has been fused and nothing is exchanged.
        """
        if self.is_scheduled:
            return False
        worked_on = False
        for computation in self.computations.values():
            for name, opcode in computation.opcodes.items():
                if opcode == "custom-call":
                    text = computation.instruction(name).attribute_text
                    if _FOR_THE_PARTITIONER.search(text):
                        return True
                worked_on = worked_on or opcode.startswith(_COMPILERS_OWN)
        return not worked_on

    def called_by(self, instruction: Instruction, *roles: str) -> Computation:
        """Return the computation that an instruction calls in the first of these roles that it has.

        Raises:
            HloParseError: when it has none of them, or the computation is not in the text.
        """
        called = instruction.called()
        for role in roles:
            if called.get(role) in self.computations:
                return self.computations[called[role]]
        raise instruction.damaged(f"no computation as {' or '.join(roles)}")

    def source(self, instruction: Instruction) -> str | None:
        """Return the `file:line` that the instruction was traced from, where known.

        For a sharding constraint it is the line of the caller, see `stack_frames`.

        Raises:
            HloParseError: when the frame is not in the tables at the top of the module.
        """
        if self._frames is None:
            lines = (line for each in self.computations.values() for line in each.lines())
            self._frames = StackFrames(self.tables, lines)
        return self._frames.source(instruction)


def _field(row: str, key: str) -> int:
    return integer_of(row, key) or 0


def parse_module(text: str) -> Module:
    """Parse one HLO module as XLA dumps it, or `Compiled.as_text()` or `Lowered.as_text("hlo")`.

    Raises:
        HloParseError: when the text is not one complete HLO module.
    """
    reader = _Reader()
    for number, line in enumerate(with_percent_signs(text).split("\n"), 1):
        reader.add(number, line.rstrip())
    return reader.finish()


@dataclass
class _Unfinished:
    """Hold the lines of an instruction that may continue on the next line.

    Attributes:
        number: number of the first line.
        lines: the lines so far.
        start: the match of `INSTRUCTION` in the first line.
        open: brackets that are open; None until it is needed.
    """

    number: int
    lines: list[str]
    start: re.Match[str]
    open: int | None = None

    def goes_on(self) -> bool:
        """Return whether a bracket is open, as where a kernel's metadata spans several lines."""
        if self.open is None:
            self.open = open_brackets(self.lines[0])
        return self.open > 0

    def add(self, line: str) -> None:
        """Add a line to an instruction that continues."""
        self.lines.append(line)
        self.open = (self.open or 0) + open_brackets(line)


class _Reader:
    """Hold the state of the one pass over the lines."""

    def __init__(self) -> None:
        self.header = ""
        self.tables: dict[str, list[str]] = {}
        self.table = ""
        self.computations: dict[str, Computation] = {}
        self.open: Computation | None = None
        self.last: _Unfinished | None = None

    def add(self, number: int, line: str) -> None:
        if not line:
            return
        if self.open is not None:
            self._inside(number, line, self.open)
        elif not self.header:
            self._module(number, line)
        elif match := _COMPUTATION.match(line):
            self._start(number, line, match)
        else:
            self._table(number, line)

    def _inside(self, number: int, line: str, computation: Computation) -> None:
        if start := INSTRUCTION.match(line):
            self._end_instruction(computation)
            self.last = _Unfinished(number, [line], start)
        elif self.last is not None and self.last.goes_on():
            self.last.add(line)
        elif line[0].isspace():
            raise bad_line(number, line, "not an instruction")
        elif not _CLOSE.match(line):
            raise bad_line(number, line, f"inside %{computation.name}, which is not closed")
        else:
            self._end_instruction(computation)
            computation.close(number, line)
            self.open = None

    def _end_instruction(self, computation: Computation) -> None:
        if self.last is not None:
            computation.add(self.last.number, "\n".join(self.last.lines), self.last.start)
            self.last = None

    def _module(self, number: int, line: str) -> None:
        if _MODULE.match(line):
            self.header = line
        elif not line.startswith("//"):
            raise bad_line(number, line, "not HLO text: it must begin with 'HloModule'")

    def _start(self, number: int, line: str, match: re.Match[str]) -> None:
        name = match[2]
        if name in self.computations:
            raise bad_line(number, line, f"computation %{name} is defined twice")
        self.open = Computation(name, bool(match[1]), number)
        self.computations[name] = self.open

    def _table(self, number: int, line: str) -> None:
        if line in TABLES and line not in self.tables:
            self.table = line
            self.tables[line] = []
            return
        row = _TABLE_ROW.match(line)
        if row is None or not self.table or int(row[1]) != len(self.tables[self.table]) + 1:
            raise bad_line(number, line, "unexpected between the computations of one module")
        self.tables[self.table].append(row[2])

    def finish(self) -> Module:
        if not self.header:
            raise HloParseError("not HLO text: it is empty")
        if self.last is not None and len(self.last.lines) > 1:
            raise bad_line(self.last.number, self.last.lines[0], "the brackets do not match")
        if self.open is not None:
            raise HloParseError(
                f"HLO text is cut off inside %{self.open.name}, which begins on line"
                f" {self.open.first_line}"
            )
        entries = [each for each in self.computations.values() if each.is_entry]
        if len(entries) != 1:
            raise HloParseError(f"HLO module has {len(entries)} ENTRY computations, not one")
        known = set(self.computations)
        for computation in self.computations.values():
            if found := computation.undefined(known):
                number, line, name = found
                raise bad_line(
                    number, line, f"%{name} is used but not defined above; text is damaged"
                )
        match = _MODULE.match(self.header)
        assert match is not None, "the header was matched when it was added"
        return Module(
            name=match[1],
            is_scheduled="is_scheduled=true" in self.header,
            num_partitions=_field(self.header, "num_partitions") or 1,
            replica_count=_field(self.header, "replica_count") or 1,
            computations=self.computations,
            entry=entries[0],
            tables=self.tables,
        )
