"""A state over data is summed into parts, and what is offloaded is on the host (accelerators)."""

from __future__ import annotations

import functools

import pytest

from moe_shard.config import load_config
from moe_shard.runtime.compile_target import TargetReport, compile_for_target
from moe_shard.runtime.targets.target import parse_target

pytestmark = pytest.mark.targets
SMALL = (
    "base_num_decoder_layers=2", "dtype=bfloat16", "base_emb_dim=256", "head_dim=64",
    "max_target_length=256",
)  # fmt: skip
OVER = ("ici_data_parallelism=4", "ici_expert_parallelism=2")


@functools.cache
def compiled(target: str, *overrides: str) -> TargetReport:
    config = load_config("mixtral-tiny", [*SMALL, *overrides])
    return compile_for_target(config, parse_target(target))


def argument_bytes(report: TargetReport) -> int:
    memory = report.lowering.memory
    assert memory is not None
    return memory["argument_bytes"]


def test_gradients_of_a_state_over_data_are_summed_into_parts() -> None:
    whole = compiled("h100:8", *OVER)
    parts = compiled("h100:8", *OVER, "shard_optimizer_over_data=true")
    assert argument_bytes(parts) < 0.26 * argument_bytes(whole)
    of_experts = {
        name: {
            (each.kind, each.count)
            for each in report.lowering.collectives
            if each.axes == ("data",) and each.scope == "experts"
        }
        for name, report in (("whole", whole), ("parts", parts))
    }
    # A layer's gradients in one collective, and all weights in one, once a step.
    assert of_experts == {
        "whole": {("all-reduce", 2)},
        "parts": {("reduce-scatter", 2), ("all-gather", 1)},
    }
    assert whole.lowering.verdict == parts.lowering.verdict == "expert-parallel"


def test_moments_on_the_host_leave_the_device() -> None:
    here, there = (
        compiled("v5e:2x4", *more) for more in ((), ("optimizer_memory_host_offload=true",))
    )
    # Parameters, and two moments of as many bytes.
    assert argument_bytes(there) < 0.36 * argument_bytes(here)
    assert there.hlo is not None
    assert "S(5)" in there.hlo
    absent = compiled("h100:8", "optimizer_memory_host_offload=true")
    assert any("optimizer_memory_host_offload is left out" in note for note in absent.notes)


def test_offloaded_activations_are_on_the_host() -> None:
    overrides = ("remat_policy=custom", "decoder_layer_input=offload", "query_proj=offload")
    for target in ("h100:8", "v5e:2x4"):
        report = compiled(target, *overrides)
        assert report.hlo is not None
        assert "S(5)" in report.hlo, target
        assert report.lowering.verdict == "expert-parallel"
