"""Every stored program against XLA's own parser: instructions, opcodes, operands, users."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_shard.lowering.hlo import Computation, parse_module
from moe_shard.lowering.opcodes import KNOWN_OPCODES
from tests.lowering.stored_programs import program_files, program_name, program_text
from tests.xla_parser import hlo

# How XLA's enumeration shortens the opcodes that it prints.
_SHORTENED = {
    "sine": "sin",
    "cosine": "cos",
    "exponential": "exp",
    "exponential-minus-one": "expm1",
    "log-plus-one": "log1p",
    "count-leading-zeros": "clz",
    "popcnt": "population-count",
    "top-k": "topk",
    "opt-barrier": "optimization-barrier",
}
_ASYNC = {"AsyncStart": "-start", "AsyncUpdate": "-update", "AsyncDone": "-done"}

Row = tuple[str, list[str], list[str]]


def plain(opcode: str) -> str:
    """An opcode without what the two spellings of it differ in."""
    return _SHORTENED.get(opcode, opcode).replace("-", "").lower()


def older(text: str) -> str:
    """A text of jax 0.12 in words that the XLA of 0.10.2 knows too.

    Attributes that it does not know are left out: none is compared. An element of a tuple that is
    used where it stands, `%t#1`, gets an instruction before its first user, named `t_1`.
    """
    text = text.replace(", is_stable=true", "")
    while (start := text.find(", sharding={")) >= 0:
        depth, end = 1, text.index("{", start) + 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        text = text[:start] + text[end:]
    lines: list[str] = []
    shapes: dict[str, str] = {}
    for line in text.split("\n"):
        if line.startswith("}"):
            shapes.clear()
        name, equals, rest = line.strip().removeprefix("ROOT ").partition(" = ")
        for of, index in re.findall(r"%([\w.\-]+)#(\d+)", line):
            element = f"{of}_{index}"
            if element not in shapes:
                shapes[element] = elements(shapes[of])[int(index)]
                made = f"{shapes[element]} get-tuple-element(%{of}), index={index}"
                lines.append(f"  %{element} = {made}")
        if equals:
            shapes[name.removeprefix("%")] = rest
        lines.append(re.sub(r"#(\d+)", r"_\1", line) if equals else line)
    return "\n".join(lines)


def elements(shape: str) -> list[str]:
    """The elements of the tuple shape that a text begins with."""
    found, depth = [""], 0
    for character in shape:
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            break
        if character == "," and depth == 1:
            found.append("")
        elif depth > 1 or character != "(":
            found[-1] += character
    return [re.sub(r"/\*.*?\*/", "", each).strip() for each in found]


def by_xla(text: str) -> dict[str, dict[str, Row]]:
    """{computation: {instruction: opcode, operands, users}} as XLA reads it.

    What XLA writes as `slice-start(...)` is to it an async start and a computation of two
    instructions that stands on no line of the text: that is left out here.
    """
    text = older(text)
    found: dict[str, dict[str, Row]] = {}
    wrapped = set()
    literal = {line.split(" = ")[0] + " = " for line in text.split("\n") if " async-" in line}
    literal = {line.removeprefix("  ").removeprefix("ROOT ") for line in literal}
    for computation in hlo.hlo_module_from_text(text).computations():
        rows = found[computation.name] = {}
        for each in computation.instructions():
            opcode = str(each.opcode).removeprefix("HloOpcode.k")
            if opcode in _ASYNC and f"%{each.name} = " not in literal:
                root = each.async_wrapped_root()
                wrapped.add(root.name)
                opcode = str(root.opcode).removeprefix("HloOpcode.k") + _ASYNC[opcode]
            rows[each.name] = (
                plain(opcode),
                [operand.name for operand in each.operands()],
                sorted(user.name for user in each.users()),
            )
    for name in [name for name in found if name.startswith("async_wrapped")]:
        if f"%{name} " not in text:
            assert wrapped & found[name].keys(), f"{name} is nobody's"
            del found[name]
    return found


def by_us(text: str) -> dict[str, dict[str, Row]]:
    """The same as this package reads it."""
    modules = parse_module(text).computations.items()
    return {name: dict(rows(each)) for name, each in modules}


def rows(computation: Computation) -> list[tuple[str, Row]]:
    found = []
    for name in computation.opcodes:
        each = computation.instruction(name)
        users = sorted({spelled(user) for user in computation.users(name)})
        operands = [spelled(operand) for operand in each.operands]
        found.append((spelled(name), (plain(each.opcode), operands, users)))
    return found


def spelled(name: str) -> str:
    """A name as `older` writes it."""
    return name.replace("#", "_")


@pytest.mark.parametrize("path", program_files(), ids=program_name)
def test_every_instruction_is_read_as_xla_reads_it(path: Path) -> None:
    text = program_text(path)
    xla, ours = by_xla(text), by_us(text)
    assert ours.keys() == xla.keys()
    for name, instructions in xla.items():
        assert ours[name].keys() == instructions.keys()
        for instruction, expected in instructions.items():
            assert ours[name][instruction] == expected, f"%{instruction} of %{name}"


def test_the_opcodes_are_those_of_xla() -> None:
    theirs = {name.removeprefix("k").lower() for name in dir(hlo.HloOpcode) if name.startswith("k")}
    ours = {plain(opcode) for opcode in KNOWN_OPCODES}
    for opcode in theirs:
        halves = re.sub("(start|update|done)$", "", opcode)
        assert opcode in ours or halves in ours, opcode
    assert ours - theirs == {"async"}  # which XLA lists by its halves


def test_there_are_programs() -> None:
    assert len(program_files()) >= 10
