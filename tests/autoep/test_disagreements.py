"""Refuse a config.json that disagrees with the tensors, and models that are not supported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_shard.autoep.detect import detect
from moe_shard.autoep.fused import read_fused
from moe_shard.errors import UserError
from tests.autoep.directory import small_models, write_model

SMALL = small_models()
Shapes = dict[str, list[int]]


def fails(directory: Path, *words: str) -> None:
    """Expect detection to fail with what, where and a fix, in at most three lines."""
    with pytest.raises(UserError) as caught:
        detect(directory)
    text = str(caught.value)
    assert text.count("\n") <= 2
    assert "fix: " in text.splitlines()[-1]
    assert text.startswith(str(directory))
    for word in words:
        assert word in text


def changed(
    tmp_path: Path, name: str, form: str = "saved", shapes: Any = None, **config: Any
) -> Path:
    model = SMALL[name]
    written = {key: v for key, v in (model["config"] | config).items() if v is not ...}
    found = dict(model[form])
    if shapes is not None:
        shapes(found)
    return write_model(tmp_path / "model", written, found)


def rename(old: str, new: str) -> Callable[[Shapes], None]:
    def apply(shapes: Shapes) -> None:
        for name in [name for name in shapes if old in name]:
            shapes[name.replace(old, new)] = shapes.pop(name)

    return apply


def drop(part: str) -> Callable[[Shapes], None]:
    def apply(shapes: Shapes) -> None:
        for name in [name for name in shapes if part in name]:
            del shapes[name]

    return apply


def put(**new: list[int]) -> Callable[[Shapes], None]:
    return lambda shapes: shapes.update({k.replace("__", "."): v for k, v in new.items()})


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("mixtral-0", {"num_hidden_layers": 3}, ["num_hidden_layers=3", "no tensor is of layer 2"]),
        ("mixtral-0", {"num_hidden_layers": 1}, ["num_hidden_layers=1", "go on to layer 1"]),
        ("deepseek_v3-0", {"num_hidden_layers": 2}, ["num_hidden_layers=2", "go on to layer 2"]),
        ("mixtral-0", {"num_hidden_layers": 10**15}, ["num_hidden_layers=1000000000000000"]),
        ("mixtral-0", {"num_hidden_layers": True}, ["num_hidden_layers=true", "whole number"]),
        ("mixtral-0", {"num_local_experts": 5}, ["num_local_experts=5", "gate.weight"]),
        ("mixtral-0", {"num_local_experts": 3}, ["num_local_experts=3", "gate.weight"]),
        ("granitemoe-0", {"num_local_experts": 5}, ["num_local_experts=5", "[4, 24]"]),
        ("mixtral-0", {"num_local_experts": 1, "num_experts_per_tok": 1}, ["num_local_experts=1"]),
        ("mixtral-0", {"num_experts_per_tok": 5}, ["num_experts_per_tok=5", "num_local_experts=4"]),
        (
            "mixtral-0",
            {"vocab_size": 41},
            ["lm_head.weight has shape [40, 24], not [41, 24]", "vocab_size=41"],
        ),
        (
            "mixtral-0",
            {"num_attention_heads": 6},
            [
                "model.layers.0.self_attn.k_proj.weight",
                "[12, 24], not [8, 24]",
                "num_attention_heads=6",
            ],
        ),
        (
            "mixtral-0",
            {"num_key_value_heads": 4},
            ["self_attn.k_proj.weight", "[12, 24], not [24, 24]", "num_key_value_heads=4"],
        ),
        (
            "mixtral-0",
            {"intermediate_size": 21},
            ["experts.0.w2.weight has shape [24, 20], not [24, 21]", "intermediate_size=21"],
        ),
        (
            "granitemoe-0",
            {"intermediate_size": 21},
            ["input_linear.weight has shape [4, 40, 24]", "M, H = [24, 21]", "hidden_size=24"],
        ),
        (
            "deepseek_v3-0",
            {"kv_lora_rank": 17},
            ["kv_a_proj_with_mqa.weight", "[24, 24], not [25, 24]", "kv_lora_rank=17"],
        ),
        (
            "deepseek_v3-0",
            {"q_lora_rank": None},
            ["no tensor for attention.query of layer 0", "model.layers.0.self_attn.q_proj.weight"],
        ),
        (
            "qwen2_moe-0",
            {"qkv_bias": False},
            [
                "_bias, which by config.json the model has not",
                "attention_bias in settings of family qw",
            ],
        ),
        (
            "qwen2_moe-1",
            {"qkv_bias": True},
            ["no tensor for attention.key_bias of layer 0", "layers.0.self_attn.k_proj.bias"],
        ),
        (
            "mixtral-1",
            {"tie_word_embeddings": False},
            ["no tensor for embedding.kernel", "lm_head.weight"],
        ),
        (
            "phimoe-0",
            {"lm_head_bias": False},
            ["lm_head.bias is embedding.bias, which by config.json the model has not"],
        ),
        (
            "deepseek_v2-0",
            {"first_k_dense_replace": 0},
            ["layer 0 has experts by first_k_dense_replace=0", "no router", "or moe_layers of fam"],
        ),
        (
            "deepseek_v2-0",
            {"first_k_dense_replace": 2},
            ["layer 1 has none by first_k_dense_replace=2", "model.layers.1.mlp.gate.weight"],
        ),
        ("deepseek_v2-0", {"first_k_dense_replace": 9}, ["no layer has experts"]),
        ("llama4_text-0", {"moe_layers": [9]}, ["moe_layers=[9] of 4 layers"]),
        ("llama4_text-0", {"moe_layers": "x"}, ['moe_layers="x" is not a list']),
        (
            "deepseek_v2-0",
            {"first_k_dense_replace": "x"},
            ['first_k_dense_replace="x" is not a wh'],
        ),
        (
            "qwen2_moe-1",
            {"shared_expert_intermediate_size": 17},
            ["shared_expert.down_proj.weight", "shared_expert_intermediate_size=17"],
        ),
        ("llama4_text-0", {"no_rope_layers": [1]}, ["no_rope_layers=[1] has 1 entries for 4"]),
        ("gpt_oss-0", {"layer_types": ["full_attention"]}, ["layer_types=", "a list of 2 names"]),
        ("gpt_oss-0", {"layer_types": [None, "full_attention"]}, ["layer_types: null is not"]),
        ("gpt_oss-0", {"layer_types": [["full_attention"]] * 2}, ["layer_types: [", "is not"]),
        (
            "gpt_oss-0",
            {"layer_types": ["linear_attention"] * 2},
            ['"linear_attention" is not comp'],
        ),
        ("gpt_oss-0", {"sliding_window": None}, ["sliding_window_size=0"]),
        ("gpt_oss-0", {"swiglu_alpha": 1.5}, ["swiglu_alpha=1.5 is not computed", "1.702"]),
        ("ernie4_5_moe-0", {"use_bias": True}, ["use_bias=true is not computed here"]),
        ("deepseek_v2-0", {"mlp_bias": True}, ["mlp_bias=true is not computed here"]),
        (
            "deepseek_v2-0",
            {"topk_method": "random"},
            ['topk_method="random"', '"greedy" or "group'],
        ),
        ("deepseek_v3-0", {"scoring_func": "softmax"}, ['scoring_func="softmax"', "sigmoid"]),
        ("deepseek_v3-0", {"moe_layer_freq": 2}, ["moe_layer_freq=2 is not computed here"]),
        ("mixtral-0", {"hidden_act": "mish"}, ['hidden_act="mish" is not computed', "silu, swish"]),
        ("mixtral-0", {"hidden_size": "x"}, ['hidden_size="x" is not a whole number']),
        ("mixtral-0", {"rms_norm_eps": None}, ["no rms_norm_eps, from which normaliz"]),
        ("mixtral-0", {"rms_norm_eps": -1}, ["config.json: rms_norm_eps=-1"]),
        ("mixtral-0", {"num_experts": 5}, ["num_experts=5 and num_local_experts=4 are one thing"]),
        ("mixtral-0", {"num_hidden_layers": "2"}, ['num_hidden_layers="2"', "without quotes"]),
        ("mixtral-0", {"sliding_window": -1}, ["sliding_window=-1 is not a number of tokens"]),
        (
            "mixtral-0",
            {"rope_theta": "1000000", "rope_parameters": None},
            ['config.json: rope_theta="1000000" is not a number', "without quotes"],
        ),
        (
            "mixtral-0",
            {"rope_scaling": {"rope_type": "yarn", "factor": "4"}},
            ['rope_scaling.factor="4" is not a number', "without quotes"],
        ),
        (
            "mixtral-0",
            {"model_type": None, "architectures": "GPT2LMHeadModel"},
            ['architectures="GPT2LMHeadModel"'],
        ),
        (
            "mixtral-0",
            {"quantization_config": {"quant_method": "fp8"}},
            ["quantization_config with fp8, but no tensor is stored so"],
        ),
        ("mixtral-0", {"quantization_config": "odd"}, ["stored as odd"]),
        ("mixtral-0", {"model_type": "gpt2", "architectures": ["GPT2"]}, ['model_type="gpt2"']),
    ],
)
def test_config_json(name: str, config: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    fails(changed(tmp_path, name, **config), *words)


@pytest.mark.parametrize(
    ("name", "form", "shapes", "words"),
    [
        ("mixtral-0", "saved", drop("layers.1.self_attn.v_"), ["attention.value of layer 1"]),
        ("mixtral-0", "saved", drop("experts.2.w3"), ["mlp.experts.up of layer 0 of expert 2"]),
        ("mixtral-0", "saved", drop("experts.3."), ["num_local_experts=4", "experts 0 to 2"]),
        ("mixtral-0", "saved", drop("experts."), ["no tensor for mlp.experts.down of layer 0"]),
        ("mixtral-0", "stacked", drop("down_proj"), ["no tensor for mlp.fused.down of layer 0"]),
        ("deepseek_v3-0", "saved", drop("correction_bias"), ["mlp.router.correction_bias of la"]),
        ("gpt_oss-0", "saved", drop("gate_up_proj_bias"), ["mlp.fused.gate_up_bias of layer 0"]),
        ("gpt_oss-0", "saved", drop("sinks"), ["no tensor for attention.sink of layer 0"]),
        ("phimoe-0", "saved", drop("norm.bias"), ["final_norm.bias"]),
        ("mixtral-0", "saved", put(other=[1]), ["other fits no name or pattern of family mixtral"]),
        (
            "mixtral-0",
            "saved",
            put(**{"model__layers__0__self_attn__q_proj__bias": [24]}),
            ["q_proj.bias is attention.query_bias, which by config.json the model has not"],
        ),
        (
            "mixtral-0",
            "saved",
            put(**{"model__layers__0__mlp__experts__gate_up_proj": [4, 40, 24]}),
            ["layer 0 has experts one by one and all in one tensor"],
        ),
        (
            "mixtral-0",
            "saved",
            put(**{"model__layers__0__mlp__gate__weight": [4, 24]}),
            ["block_sparse_moe.gate.weight", "mlp.gate.weight have one role"],
        ),
        (
            "gpt_oss-0",
            "saved",
            put(**{"model__layers__1__mlp__experts__gate_up_proj_bias": [4, 41]}),
            ["gate_up_proj_bias has shape [4, 41], not [4, 40]"],
        ),
        (
            "gpt_oss-0",
            "saved",
            rename("gate_up_proj", "gate_up_proj_blocks"),
            ["gate_up_proj_blocks (BF16) belongs to quantized weights"],
        ),
        (
            "mixtral-0",
            "saved",
            put(**{"model__layers__0__self_attn__q_proj__weight_scale_inv": [1]}),
            ["weight_scale_inv (BF16) belongs to quantized weights"],
        ),
        (
            "granitemoe-0",
            "saved",
            put(
                **{
                    "model__layers__0__block_sparse_moe__input_linear__weight": [5, 40, 24],
                    "model__layers__0__block_sparse_moe__output_linear__weight": [5, 24, 20],
                }
            ),
            ["input_linear.weight has 5 experts", "num_local_experts=4"],
        ),
        ("mixtral-0", "saved", drop("gate.weight"), ["no router: no tensor matches"]),
    ],
)
def test_tensors(
    name: str, form: str, shapes: Callable[[Shapes], None], words: list[str], tmp_path: Path
) -> None:
    fails(changed(tmp_path, name, form, shapes), *words)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [("F8_E4M3", "(F8_E4M3) belongs to quantized"), ("I64", "has dtype I64")],
)
def test_dtypes(dtype: str, words: str, tmp_path: Path) -> None:
    model = SMALL["mixtral-0"]
    one = {"model.layers.1.self_attn.q_proj.weight": dtype}
    fails(write_model(tmp_path / "model", model["config"], model["saved"], dtypes=one), words)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1, "a": 2}', "\0"])
def test_a_config_that_is_none(text: str, tmp_path: Path) -> None:
    directory = changed(tmp_path, "mixtral-0")
    (directory / "config.json").write_text(text)
    fails(directory, "config.json")


def test_layers_of_multi_token_prediction_are_carried(tmp_path: Path) -> None:
    def more(shapes: Shapes) -> None:
        for name in [name for name in shapes if ".layers.2." in name]:
            shapes[name.replace(".2.", ".3.", 1)] = shapes[name]
        shapes["model.layers.3.eh_proj.weight"] = [24, 48]

    directory = changed(tmp_path, "deepseek_v3-0", shapes=more)
    carried = detect(directory).plan.carried
    assert len(carried) == 1 + sum(".layers.2." in n for n in SMALL["deepseek_v3-0"]["saved"])
    assert all(name.startswith("model.layers.3.") for name in carried)
    # config.json gives their number.
    fails(changed(tmp_path, "deepseek_v3-0", shapes=more, num_nextn_predict_layers=0), "layer 3")


def test_a_layer_like_any_other_is_none_of_multi_token_prediction(tmp_path: Path) -> None:
    shapes = SMALL["deepseek_v3-0"]["saved"]
    again = {n.replace(".2.", ".3.", 1): s for n, s in shapes.items() if ".layers.2." in n}
    directory = changed(tmp_path, "deepseek_v3-0", shapes=lambda found: found.update(again))
    fails(directory, "num_hidden_layers=3", "go on to layer 3")


@pytest.mark.parametrize(
    ("gate_up", "down", "expected"),
    [
        ((8, 256, 64), (8, 64, 128), (8, 64, 128, True)),
        ((8, 64, 256), (8, 128, 64), (8, 64, 128, False)),
        # The model dim is twice the experts': only the down projection shows it.
        ((8, 64, 64), (8, 64, 32), (8, 64, 32, True)),
        ((8, 64, 64), (8, 32, 64), (8, 64, 32, False)),
    ],
)
def test_fused_layouts(gate_up: Any, down: Any, expected: Any) -> None:
    fused = read_fused(gate_up, down, interleaved=False, where="x")
    assert (fused.experts, fused.model_dim, fused.hidden_dim, fused.gate_up_first) == expected


@pytest.mark.parametrize(
    ("gate_up", "down"),
    [
        ((8, 64, 64), (8, 64, 64)),
        ((8, 255, 64), (8, 64, 127)),
        ((8, 64, 255), (8, 127, 64)),
        ((256, 64), (64, 128)),
        ((8, 256, 64), (64, 128)),
        ((8, 256, 64), (4, 64, 128)),
        ((8, 256, 64), (8, 128, 64)),
        ((), ()),
    ],
)
def test_fused_layouts_that_are_none(gate_up: Any, down: Any) -> None:
    with pytest.raises(UserError, match=r"neither \[E 2H M\] with .* nor"):
        read_fused(gate_up, down, interleaved=False, where="x")
