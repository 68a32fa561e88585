"""Compile `ragged` for absent TPUs and GPUs: count bytes sent, FLOPs and memory.

This needs the compilers of `make targets`, and minutes: run `make test-targets`. Nothing is run. A
TPU's compiler takes minutes a program: `make test-targets-slow` has all of its cases but one.
"""

from __future__ import annotations

from functools import cache

import pytest

from moe_shard.config import load_config
from moe_shard.lowering.walk import EXCHANGE_KINDS
from moe_shard.lowering.work import flops_by_scope
from moe_shard.runtime.compile_target import TargetReport, compile_for_target
from moe_shard.runtime.targets.target import parse_target

pytestmark = pytest.mark.targets

GPUS = ["h100:8", "mi355x:8"]
TPUS = [pytest.param(name, marks=pytest.mark.slow) for name in ("v5e:2x4", "v6e:2x4")]
LAYERS = 2  # with one, GPU's compiler merges the exchange of counts with the logits' gather
M, H, S, ROWS = 1024, 2048, 1024, 4  # model dim, hidden dim, tokens and sequences of a device
SIZE = (
    f"base_num_decoder_layers={LAYERS}",
    f"base_emb_dim={M}",
    f"base_moe_mlp_dim={H}",
    "base_num_query_heads=8",
    "base_num_kv_heads=8",
    "vocab_size=1024",
    f"max_target_length={S}",
    f"per_device_batch_size={ROWS}",
    "capacity_factor=1",
    "remat_policy=save_exchanged",  # as in training: what is recomputed is not stored
)
MANY_EXPERTS = ("num_experts=128", "num_experts_per_tok=8")  # 16 on each of 8 devices


@cache
def compiled(target: str, *overrides: str) -> TargetReport:
    config = load_config("mixtral-8x7b", [*SIZE, *overrides])
    return compile_for_target(config, parse_target(target))


def payloads(report: TargetReport) -> dict[tuple[str, str, str], int]:
    """Count the exchanges of token copies, by kind, stage and pass."""
    return {
        (each.kind, each.scope, each.pass_): each.count
        for each in report.lowering.collectives
        if each.scope in ("dispatch", "combine") and each.kind in EXCHANGE_KINDS
    }


def moe_wire_bytes(report: TargetReport) -> int:
    return sum(
        each.count * each.wire_bytes
        for each in report.lowering.collectives
        if each.scope in ("dispatch", "combine") and each.kind in EXCHANGE_KINDS
    )


def peak_temp(report: TargetReport) -> int:
    """Return the peak of memory besides the arguments.

    A GPU's temporaries are one allocation. A TPU's sum counts reused space twice: its compiler
    reports a peak, by which it also refuses programs.
    """
    memory = report.lowering.memory
    assert memory is not None
    if report.target.backend == "tpu":
        return memory["peak_bytes"] - memory["argument_bytes"]
    return memory["temp_bytes"]


@pytest.mark.parametrize("target", ["v5e:2x4", TPUS[1], *GPUS])
def test_rows_travel_by_ragged_all_to_all_and_no_more_than_were_routed(target: str) -> None:
    report = compiled(target, "moe_dispatch=ragged", "remat_policy=none")
    assert report.lowering.verdict == "expert-parallel"
    assert payloads(report) == {
        ("ragged-all-to-all", stage, pass_): LAYERS
        for stage in ("dispatch", "combine")
        for pass_ in ("forward", "backward")
    }
    # And at most one exchange of counts: compilers make it a part of another collective.
    others = [
        each
        for each in report.lowering.collectives
        if each.scope in ("dispatch", "combine") and each.kind not in EXCHANGE_KINDS
    ]
    assert [each.count for each in others] in ([], [LAYERS])
    # Two choices a token, four exchanges, bf16 rows; 7 of 8 leave the device.
    least = LAYERS * 4 * ROWS * S * 2 * M * 2 * 7 // 8
    assert least <= moe_wire_bytes(report) <= 1.05 * least
    record = report.moe["layers 0-1"]
    assert (record.strategy, record.transport) == ("ragged", "ragged-all-to-all")


@pytest.mark.parametrize("experts", [(), MANY_EXPERTS], ids=["1-a-device", "16-a-device"])
@pytest.mark.parametrize("target", [*TPUS, *GPUS])
def test_it_holds_little_more_than_gather_at_capacity_1(
    target: str, experts: tuple[str, ...]
) -> None:
    ragged, gather = (
        compiled(target, f"moe_dispatch={name}", *experts) for name in ("ragged", "gather")
    )
    assert peak_temp(ragged) <= 1.2 * peak_temp(gather)


@pytest.mark.parametrize("target", [*TPUS, *GPUS])
def test_16_experts_on_a_device_multiply_little_more_than_the_routed_rows(target: str) -> None:
    report = compiled(target, "moe_dispatch=ragged", "remat_policy=none", *MANY_EXPERTS)
    assert report.lowering.extraction is not None
    done = flops_by_scope(report.lowering.extraction.walk)["experts"]
    # Eight choices a token, three products, forward and twice backward.
    needed = LAYERS * 9 * 2 * (ROWS * S * 8) * M * H
    assert needed <= done <= 1.2 * needed
    product = report.moe["layers 0-1"].grouped_product
    assert product == ("pallas" if target in GPUS else "ragged_dot")


@pytest.mark.parametrize("target", [TPUS[0], "h100:8"])
def test_forced_balance_has_plain_equal_pieces(target: str) -> None:
    report = compiled(target, "moe_dispatch=ragged", "force_load_balance=true", "remat_policy=none")
    assert set(payloads(report)) == {
        ("all-to-all", stage, pass_)
        for stage in ("dispatch", "combine")
        for pass_ in ("forward", "backward")
    }
    assert moe_wire_bytes(report) == LAYERS * 4 * ROWS * S * 2 * M * 2 * 7 // 8
    assert report.hlo is not None
    sorts = [line for line in report.hlo.splitlines() if " sort(" in line]
    assert [line for line in sorts if "(embedding)" not in line] == []  # its gradient has one
