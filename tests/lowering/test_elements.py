"""Check elements of tuples that are used without an instruction: jax 0.12's `%tuple#1`."""

from __future__ import annotations

import re

import pytest

from moe_shard.lowering.hlo import HloParseError, parse_module
from moe_shard.lowering.loops import TripCounts
from tests.lowering.test_oracle import by_us, by_xla

SHORT = """HloModule elements, is_scheduled=true

%body (carry: (s32[], (f32[2], f32[3]))) -> (s32[], (f32[2], f32[3])) {
  %carry = (s32[]{:T(128)}, (f32[2]{0}, /*index=1*/f32[3]{0})) parameter(0)
  %one = s32[] constant(1)
  %next = s32[] add(%carry#0, %one)
  %twice = f32[2]{0} add(%carry#1#0, %carry#1#0)
  %pair = (f32[2]{0}, f32[3]{0}) tuple(%twice, /*index=1*/%carry#1#1)
  %barrier = (s32[], (f32[2]{0}, f32[3]{0})) tuple(%next, %pair)
  ROOT %after = (s32[], (f32[2]{0}, f32[3]{0})) opt-barrier(%barrier), metadata={op_name="a#0"}
}

%condition (carry.1: (s32[], (f32[2], f32[3]))) -> pred[] {
  %carry.1 = (s32[], (f32[2]{0}, f32[3]{0})) parameter(0)
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%carry.1#0, %five), direction=LT
}

ENTRY %main (x: f32[2], y: f32[3]) -> f32[3] {
  %x = f32[2]{0} parameter(0)
  %y = f32[3]{0} parameter(1)
  %zero = s32[] constant(0)
  %both = (f32[2]{0}, f32[3]{0}) tuple(%x, %y)
  %first = (s32[], (f32[2]{0}, f32[3]{0})) tuple(%zero, %both)
  %loop = (s32[], (f32[2]{0}, f32[3]{0})) while(%first), condition=%condition, body=%body
  ROOT %all = f32[3]{0} add(%loop#1#1, %loop#1#1)
}
"""

# By hand: the same with an instruction for each element, before its first user.
INSTRUCTIONS = {
    "  %next =": "  %carry_0 = s32[] get-tuple-element(%carry), index=0",
    "  %twice =": "  %carry_1 = (f32[2]{0}, f32[3]{0}) get-tuple-element(%carry), index=1\n"
    "  %carry_1_0 = f32[2]{0} get-tuple-element(%carry_1), index=0",
    "  %pair =": "  %carry_1_1 = f32[3]{0} get-tuple-element(%carry_1), index=1",
    "  ROOT %less =": "  %carry.1_0 = s32[] get-tuple-element(%carry.1), index=0",
    "  ROOT %all =": "  %loop_1 = (f32[2]{0}, f32[3]{0}) get-tuple-element(%loop), index=1\n"
    "  %loop_1_1 = f32[3]{0} get-tuple-element(%loop_1), index=1",
}


def written_out() -> str:
    text = re.sub(r"%[\w.]+(?:#\d)+", lambda name: name[0].replace("#", "_"), SHORT)
    for user, lines in INSTRUCTIONS.items():
        assert text.count(user) == 1
        text = text.replace(user, f"{lines}\n{user}")
    return text


def test_an_element_is_the_instruction_that_older_texts_have_for_it() -> None:
    explicit = by_us(written_out())
    assert explicit == by_xla(written_out())
    short = {
        computation: {
            name.replace("#", "_"): (opcode, renamed(operands), sorted(renamed(users)))
            for name, (opcode, operands, users) in instructions.items()
        }
        for computation, instructions in by_us(SHORT).items()
    }
    assert short == explicit


def renamed(names: list[str]) -> list[str]:
    return [name.replace("#", "_") for name in names]


def test_its_shape_is_that_of_its_place_in_the_tuple() -> None:
    body = parse_module(SHORT).computations["body"]
    shapes = {name: body.instruction(name).shape for name in body.opcodes if "#" in name}
    assert shapes == {
        "carry#0": "s32[]{:T(128)}",
        "carry#1": "(f32[2]{0}, f32[3]{0})",
        "carry#1#0": "f32[2]{0}",
        "carry#1#1": "f32[3]{0}",
    }


def test_the_loop_is_counted() -> None:
    module = parse_module(SHORT)
    assert TripCounts(module).of(module.entry, module.entry.instruction("loop")) == 5


def test_text_without_percent_signs_is_the_same() -> None:
    plain = SHORT.replace("%", "")
    assert by_us(plain) == by_us(SHORT)


@pytest.mark.parametrize("damage", ["%carry#2", "%one#0", "%nobody#0"])
def test_an_element_of_nothing_is_damage(damage: str) -> None:
    with pytest.raises(HloParseError, match="HLO line 6"):
        parse_module(SHORT.replace("add(%carry#0, %one)", f"add({damage}, %one)"))
