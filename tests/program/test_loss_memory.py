"""The compiled step holds no logits of a sequence, and no table of one-hot tokens."""

from __future__ import annotations

import math
import re

import pytest

from moe_shard.config import load_config
from moe_shard.program.step import make_program
from moe_shard.runtime.compile import lay_out
from moe_shard.runtime.targets.target import devices_for, parse_target
from tests.models.build import QUICK

V, S = 131072, 4096
SIZES = (
    "base_num_decoder_layers=1",
    "base_emb_dim=256",
    "base_num_query_heads=4",
    "base_num_kv_heads=4",
    "head_dim=64",
    "num_experts=8",
    "base_moe_mlp_dim=128",
    "per_device_batch_size=1",
    f"max_target_length={S}",
    f"vocab_size={V}",
    "dtype=bfloat16",
    "ici_fsdp_parallelism=2",
)
TARGETS = [
    "cpu:8",
    *(
        pytest.param(target, marks=pytest.mark.targets)
        for target in ("v5e:2x4", "h100:8", "mi355x:8")
    ),
    pytest.param("v6e:2x4", marks=[pytest.mark.targets, pytest.mark.slow]),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mesh", ["expert=4", "tensor=4"])
def test_no_array_has_an_element_for_each_token_and_word(target: str, mesh: str) -> None:
    axis, size = mesh.split("=")
    sizes = {"expert": "1", axis: size}
    parallelism = [f"ici_{axis}_parallelism={size}" for axis, size in sizes.items()]
    config = load_config("mixtral-tiny", [*SIZES, *parallelism])
    sharding, _ = lay_out(config, devices_for(parse_target(target)))
    program = make_program(config, sharding)
    lowered = program.step.lower(program.abstract_state, program.abstract_batch)
    compiled = lowered.compile(QUICK if target == "cpu:8" else None)
    text = compiled.as_text()
    assert text is not None
    words = V // dict(sharding.mesh.shape)["tensor"]
    shapes = {
        tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", text)
    }
    assert any(words in shape for shape in shapes), "the vocabulary is there"
    assert not [shape for shape in shapes if words in shape and math.prod(shape) >= S * words]
