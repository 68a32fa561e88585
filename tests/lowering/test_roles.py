"""Roles in small texts: what compilers merge, and what only shares an output."""

# ruff: noqa: E501

from __future__ import annotations

import pytest

from moe_shard.lowering.collectives import Extraction, extract_collectives
from moe_shard.lowering.verdicts import judge

# One token a row goes to the expert of its largest score: `%pick` is an argmax, `%rows` are routed,
# `%weights` meet them on a device of their own. LAST is what becomes of the gradient.
STEP = """\
HloModule step, is_scheduled=true, num_partitions=8

%larger (a: f32[], i: s32[], b: f32[], j: s32[]) -> (f32[], s32[]) {
  %a = f32[] parameter(0)
  %i = s32[] parameter(1)
  %b = f32[] parameter(2)
  %j = s32[] parameter(3)
  %more = pred[] compare(%a, %b), direction=GT
  %x = f32[] select(%more, %a, %b)
  %at = s32[] select(%more, %i, %j)
  ROOT %both = (f32[], s32[]) tuple(%x, %at)
}

%sum (c: f32[], d: f32[]) -> f32[] {
  %c = f32[] parameter(0)
  %d = f32[] parameter(1)
  ROOT %e = f32[] add(%c, %d)
}

ENTRY %main (x: f32[64,128], router: f32[128,8], w: f32[1,128,320], scale: f32[4096]) -> (f32[1,128,320], f32[4096]) {
  %x = f32[64,128]{1,0} parameter(0), sharding={devices=[8,1]<=[8]}, metadata={op_name="x"}
  %router = f32[128,8]{1,0} parameter(1), sharding={replicated}, metadata={op_name="p['router']"}
  %w = f32[1,128,320]{2,1,0} parameter(2), sharding={devices=[8,1,1]<=[8]}, metadata={op_name="p['w']"}
  %scale = f32[4096]{0} parameter(3), sharding={replicated}, metadata={op_name="p['scale']"}
  %zero = f32[] constant(0)
  %none = s32[] constant(0)
  %scores = f32[64,8]{1,0} dot(%x, %router), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %numbers = s32[64,8]{1,0} iota(), iota_dimension=1
  %best = (f32[64]{0}, s32[64]{0}) reduce(%scores, %numbers, %zero, %none), dimensions={1}, to_apply=%larger
  %pick = s32[64]{0} get-tuple-element(%best), index=1
  %place = s32[64,1]{1,0} reshape(%pick)
  %rows = f32[64,128]{1,0} gather(%x, %place), offset_dims={1}, collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1, slice_sizes={1,128}
  %sent = f32[64,128]{1,0} all-to-all(%rows), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %matrix = f32[128,320]{1,0} bitcast(%w)
  %hidden = f32[64,320]{1,0} dot(%sent, %matrix), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %gradient = f32[128,320]{1,0} dot(%sent, %hidden), lhs_contracting_dims={0}, rhs_contracting_dims={0}
LAST
}
"""
# The norm of the experts' gradient travels with the gradient of a vector, as GPUs merge them.
MERGED = """\
  %squares = f32[128,320]{1,0} multiply(%gradient, %gradient)
  %norm = f32[] reduce(%squares, %zero), dimensions={0,1}, to_apply=%sum
  %one = f32[1]{0} reshape(%norm)
  %vector = f32[4096]{0} broadcast(%norm), dimensions={}
  %both.1 = f32[4097]{0} concatenate(%vector, %one), dimensions={0}
  %reduced = f32[4097]{0} all-reduce(%both.1), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%sum
  %its = f32[4096]{0} slice(%reduced), slice={[0:4096]}
  %updated = f32[4096]{0} subtract(%scale, %its)
  %total = f32[1]{0} slice(%reduced), slice={[4096:4097]}
  %clip = f32[] reshape(%total)
  %clips = f32[128,320]{1,0} broadcast(%clip), dimensions={}
  %clipped = f32[128,320]{1,0} multiply(%gradient, %clips)
  %shaped = f32[1,128,320]{2,1,0} reshape(%clipped)
  %after = f32[1,128,320]{2,1,0} subtract(%w, %shaped)
  ROOT %all = (f32[1,128,320]{2,1,0}, f32[4096]{0}) tuple(%after, %updated)"""
REDUCED = """\
  %reduced = f32[128,320]{1,0} all-reduce(%gradient), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%sum
  %shaped = f32[1,128,320]{2,1,0} reshape(%reduced)
  %after = f32[1,128,320]{2,1,0} subtract(%w, %shaped)
  ROOT %all = (f32[1,128,320]{2,1,0}, f32[4096]{0}) tuple(%after, %scale)"""


def read(last: str) -> Extraction:
    return extract_collectives(STEP.replace("LAST", last), {"expert": 8})


def test_a_norm_that_travels_with_a_vector_is_no_gradient_of_experts() -> None:
    found = read(MERGED)
    assert judge(found).name == "expert-parallel"
    exchange, merged = found.collectives
    assert exchange.role == "token-exchange"
    assert not merged.of_experts


def test_the_gradient_of_experts_is_one_and_is_named() -> None:
    found = read(REDUCED)
    assert [each.role for each in found.collectives] == ["token-exchange", "gradient-reduction"]
    assert found.collectives[1].parameter == ("p['w']",)
    assert judge(found).name == "mixed"
    (reason,) = judge(found).reasons
    assert reason.startswith("gradient-reduction over expert: p['w'], 1 all-reduce, 164 kB")


@pytest.mark.parametrize("scope", ["experts", "attention", "loss", ""])
def test_names_decide_nothing(scope: str) -> None:
    named = STEP.replace("LAST", REDUCED).replace(
        "use_global_device_ids=true, to_apply=%sum",
        f'use_global_device_ids=true, to_apply=%sum, metadata={{op_name="jit(f)/{scope}/add"}}',
    )
    assert judge(extract_collectives(named, {"expert": 8})).name == "mixed"


def test_damaged_operands_are_one_error() -> None:
    damaged = STEP.replace("LAST", REDUCED).replace("gather(%x, %place)", "gather(%x)")
    with pytest.raises(ValueError, match=r"%?rows"):
        extract_collectives(damaged, {"expert": 8})


def test_a_sum_of_many_alike_has_a_role() -> None:
    """Of more than a hundred operands of one size none has the share that counts as large."""
    names = [f"%x{n}" for n in range(120)]
    parameters = "\n".join(
        f"  {name} = f32[] parameter({n}), sharding={{replicated}}" for n, name in enumerate(names)
    )
    result = f"({', '.join(['f32[]'] * 120)})"
    text = f"""\
HloModule norms, is_scheduled=true, num_partitions=8

%sum (c: f32[], d: f32[]) -> f32[] {{
  %c = f32[] parameter(0)
  %d = f32[] parameter(1)
  ROOT %e = f32[] add(%c, %d)
}}

ENTRY %main ({", ".join(f"{name[1:]}: f32[]" for name in names)}) -> {result} {{
{parameters}
  ROOT %all = {result} all-reduce({", ".join(names)}), channel_id=1, replica_groups=[1,8]<=[8], use_global_device_ids=true, to_apply=%sum
}}
"""
    (found,) = extract_collectives(text, mesh={"data": 8}).collectives
    assert found.kind == "all-reduce"
    assert found.role != "unknown"
