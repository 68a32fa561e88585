"""HLO text to computations and instructions. The text format is known here and nowhere else.

One pass finds the name and the opcode of every instruction and checks that the text is whole:
every `%name` that is used is defined, every computation is closed and has one root, the tables at
the top have no gap. A file that lost lines is refused, because a table of collectives computed
from half a program would look as good as a right one. The rest of a line (operands, attributes)
is parsed when somebody asks for that instruction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from moe_shard.errors import UserError

_MODULE = re.compile(r"HloModule ([^\s,]+)")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) (?:\(.*\) -> .* )?\{(?: ?//.*)?$")
_CLOSE = re.compile(r"\}(?:, .*)?$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (\S+|\(.*?\)) ([a-z][a-z0-9\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{},]')
_TABLE_ROW = re.compile(r'(\d+) (".*"|\{.*\})$')
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_CALLED = re.compile(
    r"\b(to_apply|body|condition|calls|true_computation|false_computation"
    r"|branch_computations|called_computations)=(?:%([\w.\-]+)|\{([^}]*)\})"
)
# call-start is TPU's: what it calls runs on a SparseCore, beside what follows.
_CALLERS = frozenset(
    {"while", "call", "fusion", "conditional", "async-start", "call-start", "custom-call"}
)
_OPEN, _SHUT = frozenset("([{"), frozenset(")]}")


class HloParseError(UserError):
    """Text that is no HLO, is damaged, or is spelled in a way this reader does not know."""


def _shorten(line: str) -> str:
    line = line.strip()
    shown = line if len(line) <= 100 else line[:97] + "..."
    return shown.encode("ascii", "backslashreplace").decode()


def _bad_line(number: int, line: str, problem: str) -> HloParseError:
    return HloParseError(f"HLO line {number}: {problem}: {_shorten(line)}")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation: `name = shape opcode(operand_text), attribute_text`."""

    name: str
    shape: str
    opcode: str
    operand_text: str
    attribute_text: str
    line_number: int

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return _NAME.findall(self.operand_text)

    @property
    def attributes(self) -> dict[str, str]:
        """The attributes as text, e.g. `{"channel_id": "1", "metadata": '{op_name="f"}'}`."""
        found: dict[str, str] = {}
        last = ""
        for piece in _split(self.attribute_text):
            key, equals, value = piece.partition("=")
            if key == "device_ids" and last == "replica_groups":
                found[last] += f", {piece}"  # the second half of one spelling of the groups
            elif equals:
                found[key] = value
                last = key
        return found

    @property
    def op_name(self) -> str:
        """The path of the traced program that this came from; "" when there is none."""
        match = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', self.attribute_text)
        return re.sub(r"\\(.)", r"\1", match[1]) if match else ""

    def integer(self, key: str) -> int | None:
        """The integer attribute `key`, or None."""
        match = re.search(rf"\b{key}=(\d+)", self.attribute_text)
        return int(match[1]) if match else None

    def damaged(self, problem: str) -> HloParseError:
        """The error that says what is wrong with this instruction."""
        text = f"{self.name} = {self.shape} {self.opcode}({self.operand_text})"
        return _bad_line(self.line_number, text, problem)

    def operand(self, position: int) -> str:
        """Name of one operand.

        Raises:
            HloParseError: when there are fewer.
        """
        operands = self.operands
        if position >= len(operands):
            raise self.damaged(f"operand {position} is missing")
        return operands[position]

    @property
    def parameter_number(self) -> int:
        """Which parameter of its computation a `parameter` instruction is.

        Raises:
            HloParseError: when it does not say.
        """
        if not self.operand_text.isdecimal():
            raise self.damaged("a parameter without a number")
        return int(self.operand_text)

    def called(self) -> dict[str, str]:
        """The computations it calls, by role, e.g. `{"body": "region_0.1"}`."""
        return dict(_called(self.attribute_text))


def _called(text: str) -> Iterator[tuple[str, str]]:
    for role, single, several in _CALLED.findall(text):
        for name in [single] if single else _NAME.findall(several):
            yield role, name


@dataclass(frozen=True, slots=True)
class Call:
    """An instruction that runs another computation."""

    instruction: str
    opcode: str
    role: str
    called: str


def _split(text: str) -> Iterator[str]:
    """Split at the commas that are inside no bracket and no string."""
    depth, start = 0, 0
    for token in _BRACKET.finditer(text):
        character = token[0]
        if character in _OPEN:
            depth += 1
        elif character in _SHUT:
            depth -= 1
        elif character == "," and depth == 0:
            yield text[start : token.start()].strip()
            start = token.end()
    yield text[start:].strip()


@dataclass
class Computation:
    """A named list of instructions, each parsed when it is first asked for."""

    name: str
    is_entry: bool
    first_line: int
    root: str = ""
    opcodes: dict[str, str] = field(default_factory=dict)
    _lines: dict[str, tuple[int, str]] = field(default_factory=dict)
    _parsed: dict[str, Instruction] = field(default_factory=dict)
    _users: dict[str, list[str]] = field(default_factory=dict)

    def add(self, number: int, line: str) -> None:
        """Take one line of text.

        Raises:
            HloParseError: when the line is no instruction, or repeats a name or a root.
        """
        match = _INSTRUCTION.match(line)
        if match is None:
            raise _bad_line(number, line, "not an instruction")
        is_root, name, _, opcode = match.groups()
        if name in self.opcodes:
            raise _bad_line(number, line, f"%{name} is defined twice in %{self.name}")
        self.opcodes[name] = opcode
        self._lines[name] = (number, line)
        if is_root:
            if self.root:
                raise _bad_line(number, line, f"a second root in %{self.name}")
            self.root = name

    def instruction(self, name: str) -> Instruction:
        """The instruction called `name`.

        Raises:
            HloParseError: when its brackets do not match, or there is no such instruction.
        """
        if name not in self._parsed:
            if name not in self._lines:
                raise HloParseError(f"HLO computation %{self.name} has no instruction %{name}")
            self._parsed[name] = _parse_instruction(*self._lines[name])
        return self._parsed[name]

    def parameters(self) -> Iterator[Instruction]:
        """The instructions that stand for what is passed in."""
        for name, opcode in self.opcodes.items():
            if opcode == "parameter":
                yield self.instruction(name)

    def users(self, name: str) -> list[str]:
        """Names of the instructions that have `name` as an operand, in order."""
        if not self._users:
            for user in self.opcodes:
                for operand in self.instruction(user).operands:
                    self._users.setdefault(operand, []).append(user)
        return self._users.get(name, [])

    def calls(self) -> Iterator[Call]:
        """Every call out of this computation, found without parsing the instructions."""
        for name, opcode in self.opcodes.items():
            if opcode in _CALLERS:
                for role, called in _called(self._lines[name][1]):
                    yield Call(name, opcode, role, called)

    def mentions(self, computations: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Which of these computations an instruction names, and on what line."""
        wanted = set(computations)
        for number, line in self._lines.values():
            for name in _NAME.findall(_STRING.sub("", line)):
                if name in wanted:
                    yield name, number

    def undefined(self, known: set[str]) -> tuple[int, str, str] | None:
        """The first use of a name that neither this computation nor `known` defines."""
        known = known | self._lines.keys()
        # Joining once and comparing sets is what keeps this affordable on 50 MB.
        text = "\n".join(line for _, line in self._lines.values())
        if set(_NAME.findall(text)) <= known:
            return None
        for number, line in self._lines.values():
            for name in _NAME.findall(_STRING.sub("", line)):
                if name not in known:
                    return number, line, name
        return None


def _parse_instruction(number: int, line: str) -> Instruction:
    match = _INSTRUCTION.match(line)
    assert match is not None, "the line was matched when it was added"
    depth = 1
    for token in _BRACKET.finditer(line, match.end()):
        depth += (token[0] in _OPEN) - (token[0] in _SHUT)
        if depth == 0:
            break
    else:
        raise _bad_line(number, line, "the brackets do not match")
    operand_text = re.sub(r"/\*.*?\*/", "", line[match.end() : token.start()])
    attribute_text = line[token.end() :].lstrip(", ")
    return Instruction(match[2], match[3], match[4], operand_text, attribute_text, number)


@dataclass
class Module:
    """A whole program.

    `replica_count * num_partitions` is the number of devices that run it.
    """

    name: str
    is_scheduled: bool
    num_partitions: int
    replica_count: int
    computations: dict[str, Computation]
    entry: Computation
    tables: dict[str, list[str]]

    @property
    def num_devices(self) -> int:
        """How many devices run this program."""
        return self.num_partitions * self.replica_count

    def called_by(self, instruction: Instruction, *roles: str) -> Computation:
        """The computation that an instruction calls in the first of these roles that it has.

        Raises:
            HloParseError: when it has none of them, or the computation is not in the text.
        """
        called = instruction.called()
        for role in roles:
            if called.get(role) in self.computations:
                return self.computations[called[role]]
        raise instruction.damaged(f"no computation as {' or '.join(roles)}")

    def source(self, instruction: Instruction) -> str | None:
        """`file:line` of the innermost frame the instruction was traced from, where known.

        Raises:
            HloParseError: when the frame is not in the tables at the top of the module.
        """
        text = instruction.attribute_text
        if older := re.search(r'\bsource_file="([^"]*)"(?:.*?\bsource_line=(\d+))?', text):
            return f"{older[1]}:{older[2]}" if older[2] else older[1]
        frame = instruction.integer("stack_frame_id")
        if not frame or not self.tables.get("StackFrames"):
            return None
        location = self._row("StackFrames", frame, instruction)
        place = self._row("FileLocations", _field(location, "file_location_id"), instruction)
        file = self._row("FileNames", _field(place, "file_name_id"), instruction)
        return f"{file[1:-1]}:{_field(place, 'line')}"

    def _row(self, table: str, number: int, instruction: Instruction) -> str:
        rows = self.tables.get(table, [])
        if not 1 <= number <= len(rows):
            raise HloParseError(
                f"HLO line {instruction.line_number}: %{instruction.name} points to row {number}"
                f" of {table}, which has {len(rows)}: the text is damaged"
            )
        return rows[number - 1]


def _field(row: str, key: str) -> int:
    match = re.search(rf"\b{key}=(\d+)", row)
    return int(match[1]) if match else 0


def parse_module(text: str) -> Module:
    """Parse one HLO module as XLA dumps it or `Compiled.as_text()` returns it.

    Raises:
        HloParseError: when the text is not one whole HLO module.
    """
    reader = _Reader()
    for number, line in enumerate(text.split("\n"), 1):
        reader.take(number, line.rstrip())
    return reader.finish()


class _Reader:
    """The state of the one pass over the lines."""

    def __init__(self) -> None:
        self.header = ""
        self.tables: dict[str, list[str]] = {}
        self.table = ""
        self.computations: dict[str, Computation] = {}
        self.open: Computation | None = None

    def take(self, number: int, line: str) -> None:
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
        if line[0].isspace():
            computation.add(number, line)
        elif not _CLOSE.match(line):
            raise _bad_line(number, line, f"inside %{computation.name}, which is not closed")
        elif not computation.root:
            raise _bad_line(number, line, f"%{computation.name} has no root")
        else:
            self.open = None

    def _module(self, number: int, line: str) -> None:
        if _MODULE.match(line):
            self.header = line
        elif not line.startswith("//"):
            raise _bad_line(number, line, "no HLO text: it must begin with 'HloModule'")

    def _start(self, number: int, line: str, match: re.Match[str]) -> None:
        name = match[2]
        if name in self.computations:
            raise _bad_line(number, line, f"computation %{name} is defined twice")
        self.open = Computation(name, bool(match[1]), number)
        self.computations[name] = self.open

    def _table(self, number: int, line: str) -> None:
        if line in _TABLES and line not in self.tables:
            self.table = line
            self.tables[line] = []
            return
        row = _TABLE_ROW.match(line)
        if row is None or not self.table or int(row[1]) != len(self.tables[self.table]) + 1:
            raise _bad_line(number, line, "unexpected between the computations of one module")
        self.tables[self.table].append(row[2])

    def finish(self) -> Module:
        if not self.header:
            raise HloParseError("no HLO text: it is empty")
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
                raise _bad_line(number, line, f"%{name} is used but not defined; text is damaged")
        match = _MODULE.match(self.header)
        assert match is not None, "the header was matched when it was taken"
        return Module(
            name=match[1],
            is_scheduled="is_scheduled=true" in self.header,
            num_partitions=_field(self.header, "num_partitions") or 1,
            replica_count=_field(self.header, "replica_count") or 1,
            computations=self.computations,
            entry=entries[0],
            tables=self.tables,
        )
