"""The verdict, scopes and passes, and the assertion for other people's tests."""

from __future__ import annotations

import pytest

from moe_shard.errors import UserError
from moe_shard.lowering.collectives import Collective, extract_collectives
from moe_shard.lowering.expect import assert_collectives
from moe_shard.lowering.op_names import classify, merged_names
from moe_shard.lowering.verdicts import judge, weigh
from tests.lowering.fixtures_hand_counted import HAND_COUNTED, read

BIG = 1 << 20
WO = "params['wo']"


def one(
    kind: str, role: str, *axes: str, size: int = BIG, of: str | None = None, experts: bool = True
) -> Collective:
    """A collective of this role; `of` is the path of a parameter."""
    return Collective(
        kind,
        axes,
        "other",
        "forward",
        1,
        size,
        size,
        False,
        False,
        "",
        None,
        (0, 1),
        role=role,
        parameter=None if of is None else (of,),
        of_experts=experts,
    )


EXCHANGE = one("all-to-all", "token-exchange", "expert")
GATHER = one("all-gather", "weight-gather", "expert", of=WO)
ROWS = one("all-gather", "activation-gather", "expert")


@pytest.mark.parametrize(
    ("collectives", "expected"),
    [
        ([], "no-expert-parallelism"),
        ([EXCHANGE], "expert-parallel"),
        ([one("ragged-all-to-all", "token-exchange", "expert")], "expert-parallel"),
        ([GATHER], "weight-gathered"),
        # A weight is gathered by whatever moves it.
        ([one("all-reduce", "weight-gather", "expert", of=WO)], "weight-gathered"),
        ([one("collective-permute", "weight-gather", "expert", of=WO)], "weight-gathered"),
        ([one("reduce-scatter", "gradient-reduction", "expert", of=WO)], "weight-gathered"),
        ([one("all-reduce", "gradient-reduction", "fsdp", "expert", of=WO)], "weight-gathered"),
        ([one("all-gather", "weight-gather", "?", of=WO)], "weight-gathered"),
        ([EXCHANGE, GATHER], "mixed"),
        ([EXCHANGE, one("all-gather", "weight-gather", "?", of=WO)], "mixed"),
        ([EXCHANGE, ROWS], "mixed"),
        ([EXCHANGE, one("all-reduce", "activation-reduction", "expert")], "mixed"),
        # Tokens move, but not by all-to-all: none of the words fits.
        ([ROWS], "unknown"),
        # What does not count against expert parallelism:
        ([EXCHANGE, one("all-gather", "weight-gather", "fsdp", of=WO)], "expert-parallel"),
        ([EXCHANGE, one("all-reduce", "gradient-reduction", "data", of=WO)], "expert-parallel"),
        (
            [EXCHANGE, one("all-gather", "weight-gather", "expert", of="wq", experts=False)],
            "expert-parallel",
        ),
        (
            [EXCHANGE, one("all-reduce", "activation-reduction", "expert", experts=False)],
            "expert-parallel",
        ),
        (
            [EXCHANGE, one("all-gather", "weight-gather", "expert", size=1024, of=WO)],
            "expert-parallel",
        ),
        (
            [EXCHANGE, one("all-gather", "activation-gather", "expert", size=BIG // 16)],
            "expert-parallel",
        ),
        ([EXCHANGE, one("all-gather", "activation-gather", "expert", size=BIG // 15)], "mixed"),
        # A small weight is a weight.
        ([EXCHANGE, one("all-gather", "weight-gather", "expert", size=BIG // 16, of=WO)], "mixed"),
        # Weights of experts that are not split over the axis: every device has all of them.
        ([one("all-reduce", "gradient-reduction", "expert", of="whole")], "no-expert-parallelism"),
        # An exchange along other axes moves no token to another expert.
        ([one("all-to-all", "token-exchange", "tensor")], "no-expert-parallelism"),
        ([one("all-to-all", "token-exchange", "?")], "no-expert-parallelism"),
        ([one("all-to-all", "activation-exchange", "expert")], "no-expert-parallelism"),
    ],
)
def test_verdict(collectives: list[Collective], expected: str) -> None:
    assert weigh(collectives, ("expert",), {WO}).name == expected


def test_the_reasons_name_the_weights() -> None:
    verdict = weigh([EXCHANGE, GATHER], ("expert",), {WO})
    assert verdict.reasons == ("weight-gather over expert: params['wo'], 1 all-gather, 1.0 MB",)


def test_experts_over_two_axes() -> None:
    axes = ("data", "expert")
    exchange = one("all-to-all", "token-exchange", *axes)
    gather = one("all-gather", "weight-gather", "data", of=WO)
    assert weigh([exchange], axes, {WO}).name == "expert-parallel"
    assert weigh([exchange, gather], axes, {WO}).name == "mixed"


@pytest.mark.parametrize(
    ("mesh", "axes", "expected"),
    [
        ({"expert": 8}, None, "expert-parallel"),
        ({"fsdp": 8, "expert": 1}, None, "no-expert-parallelism"),
        ({"ep": 8}, None, "expert-parallel"),
        ({"ep": 8}, ("ep",), "expert-parallel"),
        (None, None, "expert-parallel"),
    ],
)
def test_the_axis_of_the_experts(
    mesh: dict[str, int] | None, axes: tuple[str, ...] | None, expected: str
) -> None:
    found = judge(extract_collectives(read("cpu_moe"), mesh, expert_axes=axes))
    assert found.name == expected


def test_a_module_before_optimization_is_unknown() -> None:
    assert judge(extract_collectives(read("before_optimization"))).name == "unknown"


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


def test_a_persons_own_stages() -> None:
    assert classify("jit(f)/ffn_stack/dot", {"ffn_stack": "experts"})[0] == "experts"
    assert classify("jit(f)/ffn_stack/dot")[0] == "other"
    assert classify("jit(f)/experts/route/dot", {"route": "router"})[0] == "router"


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
    with pytest.raises(UserError, match=r"does not name its mesh.*\nfix: pass mesh="):
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
