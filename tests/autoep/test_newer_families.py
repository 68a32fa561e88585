"""Check the settings of families beyond the first twelve against values by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_shard.autoep.quantized import Scheme, read_scheme
from moe_shard.errors import UserError
from tests.autoep.published import CONFIGS
from tests.autoep.test_settings import settings

WHERE = Path("m/config.json")
SHAPE = {"num_hidden_layers": 4, "rope_theta": 5e4}
SMALL: dict[str, dict[str, Any]] = {
    "dots1": {**SHAPE, "n_shared_experts": 2, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe_lite": SHAPE,
    "minimax_m2": SHAPE,
}
KEYS = {
    "windows": ("attention_pattern", "sliding_window_size"),
    "experts": ("first_num_dense_layers", "interleave_moe_layer_step", "dense_layers"),
    "turned": ("partial_rotary_factor",),
}


def found(family: str, keys: str, **changes: Any) -> tuple[Any, ...]:
    all_of_them = settings({"model_type": family, **SMALL[family]}, **changes)
    return tuple(all_of_them[key] for key in KEYS[keys])


@pytest.mark.parametrize(
    ("family", "keys", "changes", "expected"),
    [
        ("dots1", "windows", {}, (["global"], 0)),
        (
            "dots1",
            "windows",
            {"max_window_layers": 2, "sliding_window": 7},
            (["global", "global", "sliding", "sliding"], 7),
        ),
        ("dots1", "windows", {"max_window_layers": 0, "sliding_window": None}, (["global"], 0)),
        (
            "dots1",
            "windows",
            {"max_window_layers": 0, "layer_types": ["full_attention"] * 4},
            (["global"], 0),
        ),
        ("glm4_moe_lite", "experts", {}, (1, 1, [])),
        ("glm4_moe_lite", "experts", {"mlp_layer_types": ["sparse"] * 4}, (0, 1, [])),
        ("glm4_moe_lite", "experts", {"mlp_layer_types": ["dense", "sparse"] * 2}, (0, 2, [])),
        (
            "glm4_moe_lite",
            "experts",
            {"mlp_layer_types": ["sparse", "dense", "dense", "sparse"]},
            (0, 1, [1, 2]),
        ),
        ("minimax_m2", "turned", {}, (1.0,)),
        ("minimax_m2", "turned", {"rotary_dim": 64}, (0.5,)),
        ("minimax_m2", "turned", {"rotary_dim": 64, "partial_rotary_factor": 0.25}, (0.25,)),
        (
            "minimax_m2",
            "turned",
            {"rotary_dim": 64, "rope_parameters": {"rope_theta": 2.0, "partial_rotary_factor": 1}},
            (1.0,),
        ),
    ],
)
def test_what_a_config_says(
    family: str, keys: str, changes: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert found(family, keys, **changes) == expected


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"] * 4}, "no layer has experts: mlp_layer_ty"),
        ("glm4_moe_lite", {"mlp_layer_types": ["moe"] * 4}, 'mlp_layer_types: "moe" is not comp'),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse"]}, "is not a list of 4 names"),
        ("minimax_m2", {"rotary_dim": 256}, "rotary_dim=256 of head_dim=128 elements"),
        ("minimax_m2", {"scoring_func": "softmax"}, 'scoring_func="softmax" is not computed'),
        ("minimax_m2", {"qk_norm_type": "per_head"}, 'qk_norm_type="per_head" is not computed'),
    ],
)
def test_what_is_not_computed_is_refused(family: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        settings({"model_type": family, **SMALL[family]}, **changes)


def test_kimi_k2_is_deepseek_v3_by_another_name() -> None:
    config = CONFIGS["DeepSeek-V3"]
    assert settings(config, model_type="kimi_k2") == settings(config)


def test_both_names_of_a_float8() -> None:
    for name in ("e4m3", "float8_e4m3fn"):
        content = {"quant_method": "fp8", "fmt": name, "weight_block_size": [128, 128]}
        assert read_scheme(content, WHERE) == Scheme("fp8", (128, 128))
