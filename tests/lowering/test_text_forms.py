"""The forms in which XLA prints a program: over several lines, with comments, not optimized yet."""

from __future__ import annotations

import pytest

from moe_shard.lowering.collectives import extract_collectives
from moe_shard.lowering.hlo import HloParseError, parse_module
from moe_shard.lowering.reports import report_from_text
from tests.lowering.fixtures_hand_counted import read
from tests.xla_parser import hlo

TEXT = """\
HloModule step, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
} // the sum

ENTRY %main (x: f32[16]) -> f32[16] { // of one device
  %x = f32[16]{0} parameter(0) // a { that is not closed
  %k = f32[16]{0} custom-call(%x), custom_call_target="a } and a \\" and // (", frontend_attributes={kernel_metadata={
"rows": "8 {",
  "nested": {
    "more": 1
}

}}, metadata={op_name="jit(f)/experts/a}b" source_file="gs://f.py" source_line=7}
  %r = f32[16]{0} all-reduce(/*index=0*/%k), channel_id=1, replica_groups={}, use_global_device_ids=true, to_apply=%sum
  ROOT %s = f32[16]{0} add(%r, %k)
}
"""  # noqa: E501


def test_an_instruction_over_several_lines() -> None:
    module = parse_module(TEXT)
    kernel = module.entry.instruction("k")
    assert (kernel.line_number, kernel.operands) == (11, ["x"])
    assert kernel.op_name == "jit(f)/experts/a}b"
    assert module.source(kernel) == "gs://f.py:7"
    assert '"more": 1' in kernel.attributes["frontend_attributes"]
    assert module.entry.instruction("r").line_number == 18
    assert module.entry.instruction("r").operands == ["k"]
    assert len(extract_collectives(TEXT).collectives) == 1


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        # Numbers of lines are those of the file.
        ("add(%r, %k)", "add(%r, %gone)", "line 19: %gone is used but not defined"),
        ("replica_groups={}", "replica_groups=all", "line 18: unknown notation"),
        # Nothing can depend on itself.
        ("custom-call(%x)", "custom-call(%s)", "line 11: %s is used but not defined above"),
        ("custom-call(%x)", "custom-call(%k)", "line 11: %k is used but not defined above"),
        # What goes on without an end is damage at its first line.
        ("}}, metadata", "}, metadata", "line 11: the brackets do not match: %k = "),
        ("}}, metadata", "}}}, metadata", "line 11: the brackets do not match: %k = "),
        ("add(%r, %k)\n}", "add(%r, %k\n}", "line 19: the brackets do not match"),
        ('{\n"rows": "8 {",', '}}\n"rows": "8 {",', "line 12: inside %main, which is not closed"),
    ],
)
def test_errors_name_the_line_of_the_file(was: str, now: str, message: str) -> None:
    assert TEXT.count(was) == 1
    with pytest.raises(HloParseError) as raised:
        extract_collectives(TEXT.replace(was, now))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_number_in_a_string_is_no_attribute() -> None:
    text = TEXT.replace('op_name="jit(f)/experts', 'op_name="stack_frame_id=9 index=3')
    kernel = parse_module(text).entry.instruction("k")
    assert kernel.integer("stack_frame_id") is None
    assert kernel.integer("source_line") == 7
    shadow = TEXT.replace("jit(f)/experts/a}b", "calls=%sum, body=%gone")
    assert parse_module(shadow).entry.instruction("k").called() == {}


SHORT = read("before_optimization")
LONG = hlo.hlo_module_from_text(SHORT).to_string()


def test_names_without_percent_signs_are_read_too() -> None:
    short, long = parse_module(SHORT), parse_module(LONG)
    assert "%" not in SHORT
    assert "%" in LONG
    for name, computation in long.computations.items():
        other = short.computations[name]
        assert other.opcodes == computation.opcodes
        assert other.root == computation.root
        for each in computation.opcodes:
            assert other.instruction(each).operands == computation.instruction(each).operands
            assert other.instruction(each).called() == computation.instruction(each).called()


def test_line_ends_of_other_systems_change_nothing() -> None:
    for text in (SHORT, LONG, TEXT, read("cpu_moe")):
        found = extract_collectives(text.replace("\n", "\r\n"))
        assert found.collectives == extract_collectives(text).collectives


@pytest.mark.parametrize("text", [SHORT, LONG])
def test_a_module_before_optimization_is_said_to_be_one(text: str) -> None:
    report = report_from_text(text, mesh={"fsdp": 2, "expert": 4})
    assert report.warnings[0].startswith("this is the module before optimization")
    assert parse_module(text).is_before_optimization
    # One without constraints asks nothing of the partitioner, but nothing has been fused in it.
    assert parse_module(text.replace('"Sharding"', '"Foreign"')).is_before_optimization


def test_a_compiled_module_is_not() -> None:
    for name in ("cpu_moe", "tpu_ring", "gpu_moe", "cpu_moe_jax012"):
        text = read(name)
        assert not parse_module(text).is_before_optimization
        # A pass in the middle leaves no schedule, but what it fused or exchanges.
        assert not parse_module(text.replace(", is_scheduled=true", "")).is_before_optimization
