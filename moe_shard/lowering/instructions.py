"""Represent the instructions and computations of HLO text, each line parsed on first use."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from moe_shard.errors import UserError

INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-#]+) = (\S+|\(.*?\)) ([a-z][a-z0-9\-]*)\(")
"""The start of an instruction: is it the root, its name, shape and opcode."""

# Strings and comments, which are not structure.
_OPAQUE = re.compile(r'"(?:[^"\\]|\\.)*"|/\*.*?\*/|//[^\n]*')
# `%tuple#1` is an element of a tuple: jax 0.12 prints no get-tuple-element for it.
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)*)")
_ELEMENT = re.compile(r"%([\w.\-]+(?:#\d+)+)")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_COMMENT = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*')
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|/\*.*?\*/|[()\[\]{},]')
_CALLED = re.compile(
    r'"(?:[^"\\]|\\.)*"'
    r"|\b(to_apply|body|condition|calls|true_computation|false_computation"
    r"|branch_computations|called_computations)=(?:%([\w.\-]+)|\{([^}]*)\})"
)
# call-start is TPU's: what it calls runs on a SparseCore, concurrently with what follows.
_CALLERS = frozenset(
    {"while", "call", "fusion", "conditional", "async-start", "call-start", "custom-call"}
)
_BETWEEN_DEVICES = ("replica_groups=", "channel_id=", "source_target_pairs=")
_OPEN, _SHUT = frozenset("([{"), frozenset(")]}")


class HloParseError(UserError):
    """Report text that is not HLO, is damaged, or is written in a way that is not known here."""


def _shorten(text: str) -> str:
    line = text.strip().partition("\n")[0]
    shown = line if len(line) <= 100 else line[:97] + "..."
    return shown.encode("ascii", "backslashreplace").decode()


def bad_line(number: int, line: str, problem: str) -> HloParseError:
    """Return the error that reports what is wrong with a line of the text."""
    return HloParseError(f"HLO line {number}: {problem}: {_shorten(line)}")


def open_brackets(text: str) -> int:
    """Count the brackets that are opened and not closed, ignoring strings and comments."""
    if '"' in text or "/" in text:
        text = _OPAQUE.sub("", text)
    return sum(map(text.count, _OPEN)) - sum(map(text.count, _SHUT))


@dataclass(frozen=True, slots=True)
class Instruction:
    """Hold one instruction: `name = shape opcode(operand_text), attribute_text`."""

    name: str
    shape: str
    opcode: str
    operand_text: str
    attribute_text: str
    line_number: int

    @property
    def operands(self) -> list[str]:
        """Return the names of the operands, in order."""
        return _NAME.findall(self.operand_text)

    @property
    def attributes(self) -> dict[str, str]:
        """Return the attributes as text, such as `{"channel_id": "1", "index": "0"}`."""
        found: dict[str, str] = {}
        last = ""
        for piece in _split(self.attribute_text):
            key, equals, value = piece.partition("=")
            if key == "device_ids" and last == "replica_groups":
                found[last] += f", {piece}"  # the second half of one notation of the groups
            elif equals:
                found[key] = value
                last = key
        return found

    @property
    def op_name(self) -> str:
        """Return the path in the traced program that this came from; "" when there is none."""
        match = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', self.attribute_text)
        return re.sub(r"\\(.)", r"\1", match[1]) if match else ""

    def integer(self, key: str) -> int | None:
        """Return the integer attribute `key`, or None."""
        return integer_of(self.attribute_text, key)

    def damaged(self, problem: str) -> HloParseError:
        """Return the error that reports what is wrong with this instruction."""
        text = f"{self.name} = {self.shape} {self.opcode}({self.operand_text})"
        return bad_line(self.line_number, text, problem)

    def operand(self, position: int) -> str:
        """Return the name of one operand.

        Raises:
            HloParseError: when there are fewer.
        """
        operands = self.operands
        if position >= len(operands):
            raise self.damaged(f"operand {position} is missing")
        return operands[position]

    @property
    def parameter_number(self) -> int:
        """Return which parameter of its computation a `parameter` instruction is.

        Raises:
            HloParseError: when it has no number.
        """
        if not self.operand_text.isdecimal():
            raise self.damaged("a parameter without a number")
        return int(self.operand_text)

    def called(self) -> dict[str, str]:
        """Return the computations it calls, by role, such as `{"body": "region_0.1"}`."""
        return dict(_called(self.attribute_text))

    def branches(self) -> list[str]:
        """Return the branches of a conditional; each takes the operand at its position."""
        return [name for _, name in _called(self.attribute_text)]


def integer_of(text: str, key: str) -> int | None:
    """Return the number in `key=number`, ignoring strings; None where there is none."""
    pattern = rf"\b{key}=(\d+)"
    match = re.search(pattern, text)
    if match and '"' in text[: match.start()]:
        match = re.search(pattern, _STRING.sub('""', text))
    return int(match[1]) if match else None


def _called(text: str) -> Iterator[tuple[str, str]]:
    for role, single, several in _CALLED.findall(text):
        if not role:
            continue  # a string
        for name in [single] if single else _NAME.findall(several):
            yield role, name


@dataclass(frozen=True, slots=True)
class Call:
    """Describe an instruction that calls another computation."""

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
    """Hold a named list of instructions, each parsed when it is first used."""

    name: str
    is_entry: bool
    first_line: int
    root: str = ""
    opcodes: dict[str, str] = field(default_factory=dict)
    _lines: dict[str, tuple[int, str]] = field(default_factory=dict)
    _parsed: dict[str, Instruction] = field(default_factory=dict)
    _users: dict[str, list[str]] = field(default_factory=dict)
    _calls: list[Call] | None = None
    _numbers: list[str] = field(default_factory=list)
    _not_yet: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, number: int, line: str, start: re.Match[str]) -> None:
        """Add the text of one instruction.

        Args:
            number: number of its first line.
            line: its text; attributes may continue over several lines.
            start: the match of `INSTRUCTION` in it.

        Raises:
            HloParseError: when its brackets do not match, or it repeats a name or a root.
        """
        if open_brackets(line):
            raise bad_line(number, line, "the brackets do not match")
        is_root, name, _, opcode = start.groups()
        if "#" in line:
            for element in _ELEMENT.findall(_OPAQUE.sub("", line)):
                self._take_element(number, line, element)
        if not self.opcodes.keys() >= set(_NAME.findall(line, start.end())):
            for used in _NAME.findall(_OPAQUE.sub("", line[start.end() :])):
                if used not in self.opcodes:  # a computation, or damage
                    self._not_yet.setdefault(used, (number, line))
        if name in self.opcodes:
            raise bad_line(number, line, f"%{name} is defined twice in %{self.name}")
        self.opcodes[name] = opcode
        self._lines[name] = (number, line)
        if is_root:
            if self.root:
                raise bad_line(number, line, f"a second root in %{self.name}")
            self.root = name
        if opcode == "parameter":
            self._numbers.append(line[start.end() :].partition(")")[0])

    def close(self, number: int, line: str) -> None:
        """Check what only the whole computation can show.

        Args:
            number: number of the line that closes it.
            line: its text.

        Raises:
            HloParseError: when it has no root, or its parameters are not numbered from 0 on.
        """
        if not self.root:
            raise bad_line(number, line, f"%{self.name} has no root")
        if set(self._numbers) != set(map(str, range(len(self._numbers)))):
            raise bad_line(number, line, f"%{self.name} lacks a parameter or repeats one")

    @property
    def arity(self) -> int:
        """Return how many parameters it has."""
        return len(self._numbers)

    def _take_element(self, number: int, user: str, element: str) -> None:
        """Insert the `get-tuple-element` that `%tuple#1` stands for, before its first user."""
        if element in self.opcodes:
            return
        of, _, index = element.rpartition("#")
        if "#" in of:
            self._take_element(number, user, of)
        if of not in self._lines:
            raise bad_line(number, user, f"%{of} is used but not defined; text is damaged")
        shape = re.sub(r"/\*.*?\*/", "", self.instruction(of).shape)
        shapes = list(_split(shape[1:-1])) if shape.startswith("(") else []
        if int(index) >= len(shapes):
            raise bad_line(number, user, f"%{of} has no element {index}")
        line = f"  %{element} = {shapes[int(index)]} get-tuple-element(%{of}), index={index}"
        self.opcodes[element] = "get-tuple-element"
        self._lines[element] = (number, line)

    def instruction(self, name: str) -> Instruction:
        """Return the instruction called `name`.

        Raises:
            HloParseError: when its brackets do not match, or there is no such instruction.
        """
        if name not in self._parsed:
            if name not in self._lines:
                raise HloParseError(f"HLO computation %{self.name} has no instruction %{name}")
            self._parsed[name] = _parse_instruction(*self._lines[name])
        return self._parsed[name]

    def lines(self) -> Iterator[str]:
        """Yield the text of every instruction, in order."""
        return (line for _, line in self._lines.values())

    def parameters(self) -> Iterator[Instruction]:
        """Return the `parameter` instructions."""
        for name, opcode in self.opcodes.items():
            if opcode == "parameter":
                yield self.instruction(name)

    def users(self, name: str) -> list[str]:
        """Return the names of the instructions that have `name` as an operand, in order."""
        if not self._users:
            for user in self.opcodes:
                for operand in self.instruction(user).operands:
                    self._users.setdefault(operand, []).append(user)
        return self._users.get(name, [])

    def calls(self) -> Iterator[Call]:
        """Yield every call out of this computation, found without parsing the instructions."""
        if self._calls is None:
            self._calls = [
                Call(name, opcode, role, called)
                for name, opcode in self.opcodes.items()
                if opcode in _CALLERS
                for role, called in _called(self._lines[name][1])
            ]
        return iter(self._calls)

    def between_devices(self, known: Collection[str]) -> Iterator[tuple[int, str, str]]:
        """Yield number, line and opcode of what names devices or a channel and is not `known`."""
        for name, (number, line) in self._lines.items():
            if self.opcodes[name] in known or not any(key in line for key in _BETWEEN_DEVICES):
                continue
            structure = _OPAQUE.sub("", line)
            if any(key in structure for key in _BETWEEN_DEVICES):
                yield number, line, self.opcodes[name]

    def mentions(self, computations: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Yield which of these computations an instruction names, and on what line."""
        wanted = set(computations)
        for number, line in self._lines.values():
            for name in _NAME.findall(_OPAQUE.sub("", line)):
                if name in wanted:
                    yield name, number

    def undefined(self, known: set[str]) -> tuple[int, str, str] | None:
        """Return the first use of a name that is not `known` and not defined on a line before.

        XLA prints a value before its users, so that nothing can depend on itself.
        """
        for name, (number, line) in self._not_yet.items():
            if name not in known:
                return number, line, name
        return None


def _parse_instruction(number: int, line: str) -> Instruction:
    match = INSTRUCTION.match(line)
    assert match is not None, "the line was matched when it was added"
    if "//" in line:
        line = _COMMENT.sub(lambda found: found[0] if found[0][0] == '"' else "", line)
    depth = 1
    for token in _BRACKET.finditer(line, match.end()):
        depth += (token[0] in _OPEN) - (token[0] in _SHUT)
        if depth == 0:
            break
    else:
        raise bad_line(number, line, "the brackets do not match")
    operand_text = re.sub(r"/\*.*?\*/", "", line[match.end() : token.start()])
    attribute_text = line[token.end() :].lstrip(", ")
    return Instruction(match[2], match[3], match[4], operand_text, attribute_text, number)
