"""Check collectives that a compiler implements with others, and those that only look so."""

# ruff: noqa: E501

from __future__ import annotations

import pytest

from moe_shard.lowering.collectives import extract_collectives
from tests.lowering.fixtures_hand_counted import read

TEXT = """\
HloModule step, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%placed (shard: f32[1,16], at: s32[]) -> f32[8,16] {
  %shard = f32[1,16]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %none = f32[] constant(0)
  %zeros = f32[8,16]{1,0} broadcast(%none), dimensions={}
  %o = s32[] constant(0)
  ROOT %whole = f32[8,16]{1,0} dynamic-update-slice(%zeros, %shard, %at, %o)
}

%cut (all: f32[8,16], from: s32[]) -> f32[1,16] {
  %all = f32[8,16]{1,0} parameter(0)
  %from = s32[] parameter(1)
  %p = s32[] constant(0)
  %mine = f32[1,16]{1,0} dynamic-slice(%all, %from, %p), dynamic_slice_sizes={1,16}
  ROOT %doubled = f32[1,16]{1,0} add(%mine, %mine)
}

%offloaded (q: f32[8,16]) -> f32[8,16] {
  %q = f32[8,16]{1,0} parameter(0)
  ROOT %r = f32[8,16]{1,0} all-reduce(%q), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%sum
}, execution_thread="sparsecore"

ENTRY %main (x: f32[1,16], g: f32[8,16], i: s32[]) -> (f32[8,16], f32[1,16]) {
  %x = f32[1,16]{1,0} parameter(0)
  %g = f32[8,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %in_zeros = f32[8,16]{1,0} fusion(%x, %i), kind=kLoop, calls=%placed
  %start = ((f32[8,16]{1,0}), f32[8,16]{1,0}, u32[]) call-start(%in_zeros), async_execution_thread="sparsecore", to_apply=%offloaded
  %done = f32[8,16]{1,0} call-done(%start)
  %reduced = f32[8,16]{1,0} all-reduce(%g), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%sum
  %mine = f32[1,16]{1,0} fusion(%reduced, %i), kind=kLoop, calls=%cut
  ROOT %out = (f32[8,16]{1,0}, f32[1,16]{1,0}) tuple(%done, %mine)
}
"""


def spelled(text: str) -> list[str]:
    return [each.implements for each in extract_collectives(text, {"expert": 8}).collectives]


def test_a_shard_in_zeros_is_gathered_and_a_sum_that_is_cut_is_scattered() -> None:
    assert spelled(TEXT) == ["all-gather", "reduce-scatter"]
    labels = [each.label for each in extract_collectives(TEXT).collectives]
    assert labels == ["all-reduce (all-gather)", "all-reduce (reduce-scatter)"]
    # What runs is what is listed for machines.
    assert {each.to_json()["kind"] for each in extract_collectives(TEXT).collectives} == {
        "all-reduce"
    }


@pytest.mark.parametrize(
    ("was", "now", "expected"),
    [
        # The shard is not an eighth.
        (
            "f32[1,16]{1,0} parameter(0)\n  %at",
            "f32[2,16]{1,0} parameter(0)\n  %at",
            ["", "reduce-scatter"],
        ),
        # The whole sum is used too.
        ("tuple(%done, %mine)", "tuple(%reduced, %mine)", ["all-gather", ""]),
        # Of the sum half is kept.
        (
            "%mine = f32[1,16]{1,0} dynamic-slice",
            "%mine = f32[4,16]{1,0} dynamic-slice",
            ["all-gather", ""],
        ),
        # Nothing is put into anything.
        ("call-start(%in_zeros)", "call-start(%g)", ["", "reduce-scatter"]),
    ],
)
def test_what_only_looks_like_it_is_a_plain_reduction(
    was: str, now: str, expected: list[str]
) -> None:
    assert was in TEXT
    assert spelled(TEXT.replace(was, now, 1)) == expected


def test_an_unrolled_ring_says_what_it_implements() -> None:
    """By the names that XLA gives the two loops: body_ag and body_rs."""
    extraction = extract_collectives(read("tpu_ring"), {"fsdp": 8})
    named = {
        (computation.partition("body_")[2][:2], each.implements)
        for (computation, _), each in extraction.at.items()
        if "windowed" in computation
    }
    assert named == {("ag", "all-gather"), ("rs", "reduce-scatter")}
    by_pass = {(each.pass_, each.implements) for each in extraction.collectives if each.implements}
    assert by_pass == {("forward", "all-gather"), ("backward", "reduce-scatter")}
