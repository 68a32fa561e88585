"""The verdict, scopes and passes, and the assertion for other people's tests."""

from __future__ import annotations

import pytest
from fixtures_hand_counted import HAND_COUNTED, read

from moe_shard.errors import UserError
from moe_shard.lowering.collectives import Collective, extract_collectives
from moe_shard.lowering.expect import assert_collectives, verdict
from moe_shard.lowering.op_names import classify, merged_names

BIG = 1 << 20


def one(
    kind: str, *axes: str, scope: str = "experts", size: int = BIG, pass_: str = "forward"
) -> Collective:
    return Collective(kind, axes, scope, pass_, 1, size, size, False, False, "", None, 8)


EXCHANGE = one("all-to-all", "expert", scope="dispatch")
GATHER = one("all-gather", "expert")


@pytest.mark.parametrize(
    ("collectives", "expected"),
    [
        ([], "no-expert-parallelism"),
        ([one("all-gather", "expert", scope="attention")], "no-expert-parallelism"),
        ([EXCHANGE], "expert-parallel"),
        ([one("all-to-all", "expert", scope="experts")], "expert-parallel"),
        ([one("ragged-all-to-all", "expert", scope="dispatch")], "expert-parallel"),
        ([GATHER], "weight-gathered"),
        ([one("collective-permute", "expert")], "weight-gathered"),
        ([one("reduce-scatter", "expert", pass_="backward")], "weight-gathered"),
        ([one("all-reduce", "fsdp", "expert", pass_="backward")], "weight-gathered"),
        ([one("all-gather", "fsdp", "expert")], "weight-gathered"),
        ([one("all-gather", "?")], "weight-gathered"),
        ([EXCHANGE, GATHER], "mixed"),
        ([EXCHANGE, one("all-reduce", "expert", scope="combine")], "mixed"),
        ([EXCHANGE, one("all-gather", "expert", scope="dispatch")], "mixed"),
        ([EXCHANGE, one("all-gather", "?")], "mixed"),
        # What does not count against expert parallelism:
        ([EXCHANGE, one("all-gather", "fsdp")], "expert-parallel"),
        ([EXCHANGE, one("all-reduce", "tensor")], "expert-parallel"),
        ([EXCHANGE, one("all-gather", "expert", scope="attention")], "expert-parallel"),
        ([EXCHANGE, one("all-gather", "expert", scope="embedding")], "expert-parallel"),
        ([EXCHANGE, one("all-reduce", "fsdp", "expert", scope="router")], "expert-parallel"),
        ([EXCHANGE, one("all-reduce", "expert", size=4)], "expert-parallel"),
        ([EXCHANGE, one("all-gather", "expert", size=1024)], "expert-parallel"),
        (
            [EXCHANGE, one("all-gather", "expert", scope="dispatch", size=BIG // 16)],
            "expert-parallel",
        ),
        ([EXCHANGE, one("all-gather", "expert", scope="dispatch", size=BIG // 15)], "mixed"),
        # Beside the experts' own products stand no indices: a small weight is a weight.
        ([EXCHANGE, one("all-gather", "expert", size=BIG // 16)], "mixed"),
        # An exchange along other axes moves no token to another expert.
        ([one("all-to-all", "tensor", scope="dispatch")], "no-expert-parallelism"),
        ([one("all-to-all", "?", scope="dispatch")], "no-expert-parallelism"),
    ],
)
def test_verdict(collectives: list[Collective], expected: str) -> None:
    assert verdict(collectives, ("expert",)) == expected


def test_an_expert_axis_of_size_1_is_no_expert_parallelism() -> None:
    assert verdict([EXCHANGE, GATHER], ()) == "no-expert-parallelism"


def test_experts_over_two_axes() -> None:
    exchange = one("all-to-all", "data", "expert", scope="dispatch")
    assert verdict([exchange], ("data", "expert")) == "expert-parallel"
    assert verdict([exchange, one("all-gather", "data")], ("data", "expert")) == "mixed"


@pytest.mark.parametrize(
    ("op_name", "scope", "pass_"),
    [
        ("", "other", "unknown"),
        ("jit(step)/moe/dispatch/dot_general", "dispatch", "forward"),
        ("jit(step)/jvp(dispatch)/sharding_constraint", "dispatch", "forward"),
        ("jit(step)/transpose(jvp(dispatch))/mul", "dispatch", "backward"),
        ("jit(step)/transpose(jvp(decoder))/while/body/moe/combine/add", "combine", "backward"),
        ("jit(step)/while/body/checkpoint/rematted_computation/experts/dot", "experts", "backward"),
        ("jit(step)/optimizer/mul", "optimizer", "optimizer"),
        ("jit(step)/loss/moe/router/dot_general", "router", "forward"),
        ("jit(loss)/jvp()/reduce_sum", "other", "forward"),
        ("jit(main)/jit(experts)/mul", "other", "forward"),
        ("jit(step)/my_dispatcher/pre-dispatch/mul", "other", "forward"),
        ("params['layers']['experts']['up']", "experts", "unknown"),
        ("jit(f)/attention/dot;jit(f)/experts/dot", "experts", "forward"),
        ("jit(f)/(jvp()/reduce_sum:transpose(jvp(router))/dot_general)", "router", "backward"),
        ("jit(f)/jvp()/while/experts/(a,b->c/dot:b,d->e/dot)", "experts", "forward"),
        ("jit(f)/(loss/sum:transpose(jvp(loss))/dot", "loss", "backward"),
    ],
)
def test_scope_and_pass(op_name: str, scope: str, pass_: str) -> None:
    assert classify(op_name) == (scope, pass_)


def test_merged_names() -> None:
    assert merged_names("a;b/c") == ["a", "b/c"]
    assert merged_names("jit(f)/(x/y:z)/w") == ["jit(f)/x/y/w", "jit(f)/z/w"]
    assert merged_names("(a:(b:c))") == ["a", "b", "c"]
    assert merged_names("jit(f)/(x") == ["jit(f)/(x"]


MOE = read("cpu_moe")
MESH = HAND_COUNTED["cpu_moe"][0]


class Compiled:
    def as_text(self) -> str:
        return MOE


class Mesh:
    shape = MESH


def test_assert_collectives_holds() -> None:
    assert_collectives(MOE, all_to_all=4, all_gather=0, all_reduce=1)
    assert_collectives(Compiled(), mesh=Mesh(), axis="expert", scope="dispatch", all_to_all=2)
    assert_collectives(MOE, mesh=MESH, axis="fsdp", all_to_all=0)
    assert_collectives(MOE, pass_="backward", all_to_all=2, all_reduce=1, collective_permute=0)


def test_assert_collectives_says_what_it_found() -> None:
    with pytest.raises(AssertionError) as error:
        assert_collectives(MOE, mesh=MESH, scope="dispatch", all_to_all=1, all_gather=0)
    message = str(error.value)
    assert "expected 1 all-to-all, found 2" in message
    assert "program.py:" in message
    assert "all-to-all x1 over expert, dispatch backward, 4096 B" in message


def test_assert_collectives_needs_a_mesh_for_an_axis() -> None:
    with pytest.raises(ValueError, match="needs mesh"):
        assert_collectives(MOE, axis="expert", all_to_all=4)
    with pytest.raises(UserError):
        assert_collectives("not HLO", all_to_all=0)


MERGED = """\
HloModule step, is_scheduled=true, num_partitions=8

ENTRY %main (c: s32[1,32], w: bf16[360,512]) -> (s32[8,32], bf16[2880,512]) {
  %c = s32[1,32]{1,0} parameter(0)
  %w = bf16[360,512]{1,0} parameter(1)
  %start = ((s32[1,32]{1,0}, bf16[360,512]{1,0}), (s32[8,32]{1,0}, bf16[2880,512]{1,0})) all-gather-start(%c, %w), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/(NAMES)"}
  ROOT %done = (s32[8,32]{1,0}, bf16[2880,512]{1,0}) all-gather-done(%start)
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("names", "scope"),
    [
        ("dispatch/all_gather:attention/gather", "attention"),
        ("attention/gather:experts/gather", "experts"),
        # Which name is of which operand is not known: the stage that matters most speaks.
        ("dispatch/all_gather:attention/gather:attention/gather", "dispatch"),
    ],
)
def test_of_merged_ops_those_that_send_much_say_the_stage(names: str, scope: str) -> None:
    (found,) = extract_collectives(MERGED.replace("NAMES", names), {"expert": 8}).collectives
    assert found.scope == scope
    assert found.bytes == 8 * 32 * 4 + 2880 * 512 * 2
