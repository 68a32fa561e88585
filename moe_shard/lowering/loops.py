"""Find out how many times the body of a `while` runs.

CPU and GPU write `known_trip_count`. TPU does not: there the condition compares an element of the
carry with a bound, and the body adds a step to that element. Both are followed through the small
set of operations that XLA puts in between (copies, fusions, elements that the loop only passes on).
For anything else the result is None, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from moe_shard.lowering.hlo import Call, Computation, Instruction, Module
from moe_shard.lowering.opcodes import is_known_opcode

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COUNTED = '"known_induction_variable"'
"""The compiler found the induction variable, so it can be found here, and must agree."""
_TRANSPARENT = frozenset({"copy", "bitcast", "convert", "reshape", "copy-done", "copy-start"})
_FLIPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE", "EQ": "EQ"}
_MAX_DEPTH = 200


@dataclass(frozen=True, slots=True)
class Carry:
    """Stand for element `index` of the loop's carry at the start of an iteration, plus `offset`."""

    index: int
    offset: int = 0


Known = int | Carry | None
TuplePath = tuple[int, ...]


@dataclass(frozen=True)
class Frame:
    """Bind the parameters of a computation: `bind(number, tuple path)` returns what one holds."""

    computation: Computation
    bind: Callable[[int, TuplePath], Known]


@dataclass(frozen=True)
class _Loop:
    """Hold one `while` and the computation it is in."""

    instruction: Instruction
    outer: Computation
    condition: Frame
    body: Frame


class TripCounts:
    """Count the trips of the loops of one module.

    Attributes:
        contradictions: loops with two different counts, one sentence each.
    """

    def __init__(self, module: Module) -> None:
        """Record who calls what; trips are counted on demand."""
        self.contradictions: list[str] = []
        self._module = module
        self._callers: dict[str, list[tuple[Computation, Call]]] = {}
        for computation in module.computations.values():
            for call in computation.calls():
                self._callers.setdefault(call.called, []).append((computation, call))

    def of(self, outer: Computation, loop: Instruction) -> int | None:
        """Return the trips of the `while` instruction `loop` in `outer`; None where unknown."""
        stated = _KNOWN.search(loop.attribute_text)
        if stated is None:
            return self._trips(self._loop(outer, loop))
        trips = int(stated[1])
        if _COUNTED not in loop.attribute_text:
            return trips
        followed = self._trips(self._loop(outer, loop))
        if followed not in (None, trips):
            self.contradictions.append(
                f"loop %{loop.name} (HLO line {loop.line_number}) has known_trip_count {trips}, but"
                f" its condition and step give {followed}: the larger is counted"
            )
        return max(trips, followed or 0)

    def _loop(self, outer: Computation, loop: Instruction) -> _Loop:
        def bind(_number: int, path: TuplePath) -> Known:
            return Carry(path[0]) if len(path) == 1 else None

        condition = self._module.called_by(loop, "condition")
        body = self._module.called_by(loop, "body")
        return _Loop(loop, outer, Frame(condition, bind), Frame(body, bind))

    def _trips(self, loop: _Loop) -> int | None:
        compared = self._comparison(loop.condition, loop.condition.computation.root, 0)
        if compared is None:
            return None
        left, right, direction = compared
        left, right = self._settled(left, loop), self._settled(right, loop)
        if isinstance(left, int) and isinstance(right, Carry):
            left, right, direction = right, left, _FLIPPED.get(direction, "")
        if not isinstance(left, Carry) or not isinstance(right, int):
            return None
        after = self._next(loop, left.index)
        first = self._initial(loop, left.index)
        if not isinstance(after, Carry) or after.index != left.index or first is None:
            return None
        return _count(first + left.offset, after.offset, right, direction)

    def _next(self, loop: _Loop, index: int) -> Known:
        return self._value(loop.body, loop.body.computation.root, (index,), 0)

    def _initial(self, loop: _Loop, index: int, depth: int = 0) -> int | None:
        frame = Frame(loop.outer, self._outer_bind(loop.outer, depth))
        value = self._value(frame, loop.instruction.operand(0), (index,), depth)
        return value if isinstance(value, int) else None

    def _settled(self, value: Known, loop: _Loop, depth: int = 0) -> Known:
        """Return the number of a carry element that the loop only passes on; else `value`."""
        if not isinstance(value, Carry) or self._next(loop, value.index) != Carry(value.index):
            return value
        first = self._initial(loop, value.index, depth)
        return None if first is None else first + value.offset

    def _outer_bind(
        self, computation: Computation, depth: int
    ) -> Callable[[int, TuplePath], Known]:
        """Bind the parameters of `computation`, where it has exactly one caller."""

        def bind(number: int, path: TuplePath) -> Known:
            callers = self._callers.get(computation.name, [])
            if len(callers) != 1 or depth >= _MAX_DEPTH:
                return None
            outer, call = callers[0]
            instruction = outer.instruction(call.instruction)
            if call.role in ("body", "condition") and len(path) == 1:
                loop = self._loop(outer, instruction)
                value = self._settled(Carry(path[0]), loop, depth + 1)
                return value if isinstance(value, int) else None
            if call.opcode in ("fusion", "call"):
                frame = Frame(outer, self._outer_bind(outer, depth + 1))
                return self._value(frame, instruction.operand(number), path, depth + 1)
            return None

        return bind

    def _comparison(self, frame: Frame, name: str, depth: int) -> tuple[Known, Known, str] | None:
        instruction = frame.computation.instruction(name)
        if depth >= _MAX_DEPTH:
            return None
        if instruction.opcode == "compare":
            left, right = (self._value(frame, instruction.operand(i), (), depth) for i in (0, 1))
            direction = instruction.attributes.get("direction", "")
            if direction not in _FLIPPED:
                raise instruction.damaged("a comparison without a direction")
            return left, right, direction
        if instruction.opcode in _TRANSPARENT:
            return self._comparison(frame, instruction.operand(0), depth + 1)
        if instruction.opcode in ("fusion", "call"):
            inner = self._inner(frame, instruction, depth)
            return self._comparison(inner, inner.computation.root, depth + 1)
        if not is_known_opcode(instruction.opcode):
            raise instruction.damaged("unknown opcode in the condition of a loop")
        return None

    def _inner(self, frame: Frame, call: Instruction, depth: int) -> Frame:
        def bind(number: int, path: TuplePath) -> Known:
            return self._value(frame, call.operand(number), path, depth + 1)

        return Frame(self._module.called_by(call, "calls", "to_apply"), bind)

    def _value(self, frame: Frame, name: str, path: TuplePath, depth: int) -> Known:
        """Evaluate an instruction, or its element at `path` when it is a tuple."""
        if depth >= _MAX_DEPTH:
            return None
        instruction = frame.computation.instruction(name)
        opcode = instruction.opcode
        if opcode == "constant":
            literal = instruction.operand_text.strip()
            return int(literal) if re.fullmatch(r"-?\d+", literal) else None
        if opcode == "parameter":
            return frame.bind(instruction.parameter_number, path)
        if opcode in _TRANSPARENT:
            return self._value(frame, instruction.operand(0), path, depth + 1)
        if opcode == "get-tuple-element":
            index = instruction.integer("index")
            inside = (index or 0, *path)
            return self._value(frame, instruction.operand(0), inside, depth + 1)
        if opcode == "opt-barrier":
            return self._value(frame, instruction.operand(0), path, depth + 1)
        if opcode == "tuple" and path:
            return self._value(frame, instruction.operand(path[0]), path[1:], depth + 1)
        if opcode in ("add", "subtract"):
            pair = (instruction.operand(0), instruction.operand(1))
            left, right = (self._value(frame, each, (), depth + 1) for each in pair)
            return _add(left, right) if opcode == "add" else _subtract(left, right)
        if opcode in ("fusion", "call"):
            inner = self._inner(frame, instruction, depth)
            return self._value(inner, inner.computation.root, path, depth + 1)
        if not is_known_opcode(opcode):
            raise instruction.damaged("unknown opcode in what a loop counts")
        return None


def _add(left: Known, right: Known) -> Known:
    if isinstance(left, int):
        left, right = right, left
    if not isinstance(right, int) or left is None:
        return None
    return left + right if isinstance(left, int) else Carry(left.index, left.offset + right)


def _subtract(left: Known, right: Known) -> Known:
    return _add(left, -right) if isinstance(right, int) else None


def _count(value: int, step: int, bound: int, direction: str) -> int | None:
    """Count the iterations until `value + n * step` no longer compares true with `bound`."""
    if direction in ("GT", "GE"):
        value, step, bound = -value, -step, -bound
    if direction in ("LE", "GE"):
        bound += 1
    distance = bound - value
    if direction == "NE":
        divides = step != 0 and distance % step == 0 and distance // step >= 0
        return distance // step if divides else None
    if direction not in ("LT", "LE", "GT", "GE"):
        return None
    if distance <= 0:
        return 0
    return -(-distance // step) if step > 0 else None
