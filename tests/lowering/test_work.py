"""Compare FLOPs, memory traffic and the timeline with hand counts on small programs."""

# ruff: noqa: E501

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe_shard.config.hardware import list_hardware, load_hardware
from moe_shard.lowering.collectives import Collective, extract_collectives
from moe_shard.lowering.hlo import HloParseError
from moe_shard.lowering.timeline import Rates, timeline
from moe_shard.lowering.work import flops_by_scope, memory_by_scope
from moe_shard.runtime.bounds import MoEBounds
from moe_shard.runtime.compile import rates_of
from tests.lowering.fixtures_hand_counted import read

PROGRAMS = Path(__file__).parent / "programs"
RATES = Rates(flops=1e3, memory=1e9, link=100.0)

# A product of 2 * 4 * 8 * 16 = 1,024 FLOPs runs between the start and the end of an all-gather of
# 256 B on 4 devices (192 B must be sent), in a loop of 3 trips; a second one by itself.
LOOP = """\
HloModule step, is_scheduled=true, num_partitions=4

%body (p: (s32[], f32[4,16], f32[16,8])) -> (s32[], f32[4,16], f32[16,8]) {
  %p = (s32[], f32[4,16]{1,0}, f32[16,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,16]{1,0} get-tuple-element(%p), index=1
  %w = f32[16,8]{1,0} get-tuple-element(%p), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %start = (f32[1,16]{1,0}, f32[4,16]{1,0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/while/body/dispatch/all_gather"}
  %y = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/while/body/experts/dot_general"}
  %done = f32[4,16]{1,0} all-gather-done(%start)
  ROOT %out = (s32[], f32[4,16]{1,0}, f32[16,8]{1,0}) tuple(%next, %done, %w)
}

%condition (q: (s32[], f32[4,16], f32[16,8])) -> pred[] {
  %q = (s32[], f32[4,16]{1,0}, f32[16,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %three), direction=LT
}

ENTRY %main (a: f32[4,16], b: f32[16,8]) -> f32[4,8] {
  %a = f32[4,16]{1,0} parameter(0)
  %b = f32[16,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %before = (s32[], f32[4,16]{1,0}, f32[16,8]{1,0}) tuple(%zero, %a, %b)
  %loop = (s32[], f32[4,16]{1,0}, f32[16,8]{1,0}) while(%before), condition=%condition, body=%body
  %last = f32[4,16]{1,0} get-tuple-element(%loop), index=1
  ROOT %z = f32[4,8]{1,0} dot(%last, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/logits/dot_general"}
}
"""


def flops(text: str) -> dict[str, int]:
    return dict(flops_by_scope(extract_collectives(text).walk))


def test_products_count_by_stage_with_their_trips() -> None:
    assert flops(LOOP) == {"experts": 3 * 1024, "logits": 1024}


def test_memory_is_operands_and_results() -> None:
    each = (4 * 16 + 16 * 8 + 4 * 8) * 4
    moved = memory_by_scope(extract_collectives(LOOP).walk)
    assert (moved["experts"], moved["logits"]) == (3 * each, each)


def test_a_loop_hides_what_runs_beside_its_exchange() -> None:
    found = timeline(extract_collectives(LOOP), RATES)
    (exchange,) = found.exchanges
    # 1.92 s on the wire, 1.024 s of them overlapped with the product; three times. Then the last product.
    assert exchange.seconds == pytest.approx(3 * 1.92)
    assert exchange.waited == pytest.approx(3 * (1.92 - 1.024))
    assert exchange.overlapped["experts"] == pytest.approx(3 * 1.024)
    assert found.computing == pytest.approx(4 * 1.024, rel=1e-3)  # sums and indices take some
    assert found.seconds == pytest.approx(3 * 1.92 + 1.024, rel=1e-3)
    first, assumed, stage = found.lines(tokens=8)
    assert "47% overlapped" not in first
    assert "53% overlapped" in first
    assert "nothing was run" in assumed
    assert stage == "  dispatch: 5.76 s on the wire, 53% overlapped with experts"


def test_the_same_program_without_async_hides_nothing() -> None:
    text = LOOP.replace(
        "(f32[1,16]{1,0}, f32[4,16]{1,0}) all-gather-start", "f32[4,16]{1,0} all-gather"
    )
    text = text.replace("f32[4,16]{1,0} all-gather-done(%start)", "f32[4,16]{1,0} copy(%start)")
    found = timeline(extract_collectives(text), RATES)
    assert found.waited == pytest.approx(found.on_wire) == pytest.approx(3 * 1.92)
    assert found.seconds == pytest.approx(3 * (1.92 + 1.024) + 1.024, rel=1e-3)


def test_two_exchanges_share_the_wire() -> None:
    second = LOOP[LOOP.index("  %start =") : LOOP.index("  %y =")].replace("%start", "%again")
    text = LOOP.replace("  %y =", second + "  %y =").replace(
        "  ROOT %out", "  %late = f32[4,16]{1,0} all-gather-done(%again)\n  ROOT %out"
    )
    found = timeline(extract_collectives(text), RATES)
    assert found.seconds == pytest.approx(3 * 2 * 1.92 + 1.024, rel=1e-3)


def test_products_of_a_compiled_program_agree_with_xla() -> None:
    """Without a loop XLA's own count is whole; it counts the additions of a bias too."""

    def forward(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        y = jnp.einsum("ebm,emh->ebh", x, w)
        return jnp.einsum("ebh,ehm->bm", y, v)

    shapes = ((4, 8, 32), (4, 32, 64), (4, 64, 32))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(forward).lower(*arguments).compile()
    expected = 2 * 4 * 8 * 32 * 64 * 2
    assert sum(flops(compiled.as_text() or "").values()) == expected
    cost: Any = compiled.cost_analysis()
    assert expected <= cost["flops"] < 1.05 * expected


def test_of_a_conditional_the_branch_with_most_products_counts() -> None:
    def step(x: jax.Array, which: jax.Array) -> tuple[jax.Array, None]:
        products = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
        return jax.lax.switch(which, products, x), None

    x, which = jnp.ones((32, 32)), jnp.arange(5) % 3
    compiled = jax.jit(lambda x, which: jax.lax.scan(step, x, which)[0]).lower(x, which).compile()
    text = compiled.as_text()
    assert text is not None
    assert " conditional(" in text
    assert sum(flops(text).values()) == 5 * 2 * (2 * 32**3)


def convolution(window: str, labels: str, lhs: str, rhs: str, out: str) -> int:
    text = f"""\
HloModule step

ENTRY %main (a: {lhs}, b: {rhs}) -> {out} {{
  %a = {lhs} parameter(0)
  %b = {rhs} parameter(1)
  ROOT %c = {out} convolution(%a, %b), window={window}, dim_labels={labels}
}}
"""
    return flops(text).get("unknown", 0)


def test_convolutions_as_tpu_writes_products() -> None:
    # A plain product.
    assert convolution("{}", "bf_io->bf", "f32[6,16]", "f32[16,8]", "f32[6,8]") == 2 * 6 * 16 * 8
    # bsm,mnd->bsnd: 32 heads as a padded, reversed window of which each output meets one place.
    assert (
        convolution(
            "{size=1x32 pad=0_0x31_31 rhs_reversal=0x1}",
            "0bf1_i1o0->0b1f",
            "f32[6,4096,512,1]",
            "f32[512,32,128,1]",
            "f32[6,4096,32,128]",
        )
        == 2 * 6 * 4096 * 512 * 32 * 128
    )
    # A batch dim of 6 as a dilated window with a stride.
    assert (
        convolution(
            "{size=6 stride=5 lhs_dilate=6}",
            "0bf_0oi->0bf",
            "f32[6,7,9]",
            "f32[6,5,9]",
            "f32[6,7,5]",
        )
        == 2 * 6 * 7 * 5 * 9
    )
    # An ordinary one: 3 taps over 10 places with padding, of which 2 are outside the input.
    assert convolution(
        "{size=3 pad=1_1}", "b0f_0io->b0f", "f32[2,10,4]", "f32[3,4,8]", "f32[2,10,8]"
    ) == 2 * 2 * 4 * 8 * (3 * 10 - 2)


@pytest.mark.parametrize(
    ("window", "labels", "says"),
    [
        ("{size=2}", "bf_io->bf", "a window of another rank"),
        ("{}", "bf", "without dim_labels"),
        ("{}", "b0f_0io->b0f", "dim_labels do not fit"),
    ],
)
def test_a_damaged_convolution_is_refused(window: str, labels: str, says: str) -> None:
    with pytest.raises(HloParseError, match=says):
        convolution(window, labels, "f32[6,16]", "f32[16,8]", "f32[6,8]")


def test_a_ring_multiplies_every_shard_once() -> None:
    # 2,048 rows of a device by 8,192 x 8,192, forward and the weight's gradient.
    walk = extract_collectives(read("tpu_ring")).walk
    assert flops_by_scope(walk)["experts"] == 2 * 2 * 2048 * 8192 * 8192


def test_the_ring_hides_beside_its_own_product() -> None:
    rates = rates_of(load_hardware("v5e"), "bfloat16")
    assert rates is not None
    found = timeline(extract_collectives(read("tpu_ring")), rates)
    # 550 GFLOP at 197 TFLOP/s; nine permutes of 16.8 MB each way at 200 GB/s.
    assert 2.79e-3 < found.seconds < 4.5e-3
    assert found.on_wire == pytest.approx(18 * 16_777_216 / 2e11, rel=1e-3)
    assert found.waited < 0.2 * found.on_wire
    assert found.cycles is not None
    assert 10**6 < found.cycles < 10**7


def test_a_collective_between_hosts_pays_for_the_network() -> None:
    def exchange(kind: str, group: tuple[int, ...]) -> float:
        each = Collective(kind, (), "", "", 1, 0, 1000, False, False, "", None, group)
        return Rates(1.0, 1.0, link=1000.0, network=100.0).exchange(each)

    assert exchange("all-to-all", tuple(range(8))) == 1.0
    # Of 15 pieces 8 go to the other host.
    assert exchange("all-to-all", tuple(range(16))) == pytest.approx(1000 * 8 / 15 / 100)
    # 8 devices of a host share what leaves it.
    assert exchange("all-gather", tuple(range(16))) == 1.0
    assert exchange("all-gather", (0, 8)) == pytest.approx(10.0)


def test_the_bounds_stand_beside_what_the_program_does() -> None:
    extraction = extract_collectives(read("cpu_moe"), {"expert": 8})
    # Four all-to-alls of 4,096 B and the router's all-reduce of 1,028 B (twice), 7/8 of each.
    lines = MoEBounds(7168, 100, 10**12, 10**12, 10**9, 10**10).lines(extraction, ["expert"])
    assert "16.1 kB on the wire, 2.25 x the least (7.2 kB; dropless 100 B)" in lines[0]
    lines = MoEBounds(10**6, 100, 2 * 2048 * 8192 * 8192, 1, 10**8, 10**8).lines(
        extract_collectives(read("tpu_ring"), {"fsdp": 8}), ["fsdp"]
    )
    assert "in a narrower dtype" in lines[0] or "x the least" in lines[0]
    assert "550 GFLOP, 2.00 x the least" in lines[1]


def test_every_accelerator_has_the_rates_of_an_estimate() -> None:
    for name in list_hardware():
        rates = rates_of(load_hardware(name), "bfloat16")
        assert (rates is None) == (name == "cpu")
        if rates is not None:
            assert rates.link < rates.memory < rates.flops
            assert rates.network is None or rates.network < rates.link


@pytest.mark.parametrize(
    ("name", "layers"),
    [("cpu_gshard_two_hop", 2), ("v5e_gshard_two_hop", 2), ("h100_gshard_fused", 1)],
)
def test_work_of_experts_is_told_without_their_names(name: str, layers: int) -> None:
    """By hand: the expert of a device takes 16 slots of 16 sequences; M 128, H 320, three matrices,
    each once forward and twice backward."""
    text = gzip.decompress((PROGRAMS / f"{name}.txt.gz").read_bytes()).decode()
    found = extract_collectives(text)
    by_names, by_flow = flops_by_scope(found.walk), flops_by_scope(found.walk, found.roles.flow)
    assert by_names["experts"] == 0
    assert by_flow["experts"] == layers * 3 * 3 * 2 * (16 * 16) * 128 * 320
    assert sum(by_names.values()) == sum(by_flow.values())


def test_work_that_is_not_told_is_not_nothing() -> None:
    bounds = MoEBounds(1, 1, 10**9, 10**9, 1, 1)
    nameless = LOOP.replace("experts/", "somewhere/")
    products = bounds.lines(extract_collectives(nameless), ["expert"])[1]
    assert products.startswith("MoE products per device: unknown, the text does not tell")
    assert "x the least" not in products
