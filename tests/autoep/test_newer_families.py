"""Check the settings of families beyond the first twelve against values by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_shard.autoep.detect import detect
from moe_shard.autoep.directory import untied
from moe_shard.autoep.family import load_family
from moe_shard.autoep.quantized import Scheme, read_scheme
from moe_shard.errors import UserError
from tests.autoep.directory import HERE, write_model
from tests.autoep.published import CONFIGS
from tests.autoep.test_settings import settings

PARTS = ("gate", "up", "down")
WHERE = Path("m/config.json")
SHAPE = {"num_hidden_layers": 4, "rope_theta": 5e4}
SMALL: dict[str, dict[str, Any]] = {
    "dots1": {**SHAPE, "n_shared_experts": 2, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe_lite": SHAPE,
    "minimax_m2": SHAPE,
    "exaone_moe": SHAPE,
    "granitemoeshared": {**SHAPE, "num_key_value_heads": 8},
    "hunyuan_v1_moe": {**SHAPE, "num_experts": 8, "moe_topk": 2, "head_dim": 128},
    "lfm2_moe": {**SHAPE, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    "granitemoehybrid": {**SHAPE, "num_key_value_heads": 8},
    "glm_moe_dsa": SHAPE,
    "nemotron_h": {"hybrid_override_pattern": "MEM*-E"},
    "llama4_text": {**SHAPE, "attention_chunk_size": None},
}
KEYS = {
    "windows": ("attention_pattern", "sliding_window_size"),
    "experts": ("first_num_dense_layers", "interleave_moe_layer_step", "dense_layers"),
    "turned": ("partial_rotary_factor",),
    "positions": ("nope_layer_interval", "nope_layers"),
    "shared": ("shared_experts", "shared_expert_mlp_dim"),
    "theta": ("rope_type", "rope_max_timescale"),
    "chosen": ("num_experts_per_tok",),
    "mixers": ("mixer_pattern", "layers_without_mlp"),
    "layers": ("base_num_decoder_layers",),
    "states": ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_expand"),
    "steps": ("mamba_step_min", "mamba_step_max"),
    "activations": ("mlp_activations",),
    "bias": ("routed_bias", "short_conv_bias", "logits_via_embedding"),
}


def found(family: str, keys: str, **changes: Any) -> tuple[Any, ...]:
    all_of_them = settings({"model_type": family, **SMALL[family]}, **changes)
    return tuple(all_of_them.get(key) for key in KEYS[keys])


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
        ("lfm2_moe", "experts", {}, (2, 1, [])),
        ("lfm2_moe", "mixers", {}, ([*["short_convolution"] * 2, "attention"], None)),
        ("lfm2_moe", "mixers", {"layer_types": ["full_attention"] * 4}, (None, None)),
        ("lfm2_moe", "bias", {}, (True, False, True)),
        (
            "lfm2_moe",
            "bias",
            {"use_expert_bias": False, "conv_bias": True, "tie_embedding": False},
            (False, True, False),
        ),
        ("granitemoehybrid", "mixers", {}, (["mamba2"], None)),
        (
            "granitemoehybrid",
            "mixers",
            {"layers_block_type": ["mamba", "attention", "linear_attention", "full_attention"]},
            (["mamba2", "attention"], None),
        ),
        ("granitemoehybrid", "positions", {}, (1, None)),
        ("granitemoehybrid", "positions", {"position_embedding_type": "nope"}, (1, None)),
        ("granitemoehybrid", "positions", {"position_embedding_type": "rope"}, (-1, None)),
        ("granitemoehybrid", "states", {}, (128, -1, 1, 2)),
        ("granitemoehybrid", "states", {"mamba_d_head": 64, "mamba_expand": 3}, (128, 64, 1, 3)),
        ("granitemoehybrid", "steps", {}, (0.0, -1.0)),
        ("granitemoehybrid", "steps", {"time_step_limit": [0.5, 2.0]}, (0.5, 2.0)),
        ("granitemoehybrid", "steps", {"time_step_limit": None}, (0.0, -1.0)),
        ("granitemoehybrid", "shared", {}, (1, 1024)),
        (
            "nemotron_h",
            "mixers",
            {},
            (["mamba2", "none", "mamba2", "attention", "none", "none"], [0, 2, 3]),
        ),
        ("nemotron_h", "experts", {}, (0, 1, [4])),
        ("nemotron_h", "layers", {"num_hidden_layers": 6}, (6,)),
        (
            "nemotron_h",
            "mixers",
            {"hybrid_override_pattern": ..., "layers_block_type": ["mamba", "moe"] * 2},
            (["mamba2", "none"], [0, 2]),
        ),
        ("nemotron_h", "layers", {"hybrid_override_pattern": ...}, (4,)),
        ("nemotron_h", "activations", {}, (["relu2"],)),
        (
            "nemotron_h",
            "steps",
            {"time_step_limit": [0.0, {"__float__": "Infinity"}]},
            (1e-3, None),
        ),
        ("nemotron_h", "positions", {}, (1, None)),
        ("exaone_moe", "windows", {}, (["sliding"] * 3 + ["global"], 4096)),
        ("exaone_moe", "positions", {}, (4, [])),
        ("exaone_moe", "positions", {"sliding_window_pattern": 3}, (3, [])),
        (
            "exaone_moe",
            "positions",
            {"layer_types": [f"{name}_attention" for name in ("full", *["sliding"] * 2, "full")]},
            (-1, [0, 3]),
        ),
        ("exaone_moe", "positions", {"sliding_window": None}, (-1, [])),
        ("exaone_moe", "windows", {"sliding_window": None}, (["global"], 0)),
        ("llama4_text", "positions", {"no_rope_layers": [1, 0, 0, 1]}, (-1, [1, 2])),
        ("granitemoeshared", "shared", {}, (0, -1)),
        ("granitemoeshared", "shared", {"shared_intermediate_size": 7}, (1, 7)),
        ("hunyuan_v1_moe", "chosen", {"moe_topk": [3] * 4}, (3,)),
        (
            "hunyuan_v1_moe",
            "theta",
            {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
            ("default", 5e4 * 1000 ** (128 / 126)),
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
        ("lfm2_moe", {"layer_types": ["conv", "sliding_attention"] * 2}, '"sliding_atten.*not com'),
        ("granitemoehybrid", {"hidden_act": "gelu"}, 'hidden_act="gelu" is not computed'),
        ("nemotron_h", {"num_hidden_layers": 5}, "num_hidden_layers=5, and .* has 6 entries"),
        ("nemotron_h", {"hybrid_override_pattern": "MXE"}, '"X" is not computed here'),
        ("nemotron_h", {"mlp_bias": True}, "mlp_bias=true is not computed"),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared"] * 2}, '"shared".* is not computed'),
        ("glm_moe_dsa", {"index_topk_pattern": "FSFS"}, 'index_topk_pattern="FSFS" is not'),
        ("glm_moe_dsa", {"index_topk_freq": 2}, "index_topk_freq=2 is not computed"),
        ("minimax_m2", {"rotary_dim": 256}, "rotary_dim=256 of a head of 128 elements"),
        ("hunyuan_v1_moe", {"moe_topk": [3, 2, 3, 3]}, "moe_topk=.* differs between layers"),
        ("hunyuan_v1_moe", {"use_cla": True}, "use_cla=true is not computed"),
        (
            "minimax_m2",
            {"rope_scaling": {"type": "dynamic", "alpha": 10.0}},
            "rope_scaling.alpha is not computed here",
        ),
        ("minimax_m2", {"rope_scaling": {"rope_3d": [1]}}, "rope_3d is not computed here"),
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


LING: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 300, "intermediate_size": 10},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4},
    **{"moe_intermediate_size": 8, "num_experts_per_tok": 2, "num_shared_experts": 1},
    **{"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "use_qkv_bias": True},
}


def ling(**changes: Any) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Return config.json and tensors of a small Ling, as its published code names them."""
    named = {"architectures": ["BailingMoeForCausalLM"], "model_type": "bailing_moe"}
    config: dict[str, Any] = {**named, **LING, "use_bias": False, **changes}
    shapes = {"model.word_embeddings.weight": [300, 16], "lm_head.weight": [300, 16]}
    shapes["model.norm.weight"] = [16]
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}_layernorm.weight": [16] for name in ("input", "post_attention")}
        shapes[f"{at}.attention.query_key_value.weight"] = [(4 + 2 + 2) * 8, 16]
        shapes[f"{at}.attention.query_key_value.bias"] = [(4 + 2 + 2) * 8]
        shapes[f"{at}.attention.dense.weight"] = [16, 32]
        if config.get("use_qk_norm"):
            shapes |= {f"{at}.attention.{n}_layernorm.weight": [8] for n in ("query", "key")}
        blocks = {"shared_experts": 8} | {f"experts.{e}": 8 for e in range(4)}
        if layer < config.get("first_k_dense_replace", 0):
            blocks = {"": 10}
        else:
            shapes[f"{at}.mlp.gate.weight"] = [4, 16]
            if config.get("moe_router_enable_expert_bias"):
                shapes[f"{at}.mlp.gate.expert_bias"] = [4]
        for block, size in blocks.items():
            inside = f"{at}.mlp.{block}".removesuffix(".")
            shapes |= {f"{inside}.{name}_proj.weight": [size, 16] for name in ("gate", "up")}
            shapes[f"{inside}.down_proj.weight"] = [16, size]
    return config, shapes


def test_a_fused_tensor_is_queries_then_keys_then_values(tmp_path: Path) -> None:
    detected = detect(write_model(tmp_path / "ling", *ling()))
    assert detected.settings["routed_score_func"] == "softmax"
    rng = np.random.default_rng(0)
    fused, bias = rng.standard_normal((64, 16)), rng.standard_normal(64)
    at = "model.layers.1.attention.query_key_value"
    parts = {
        ".".join(piece.param[1:]): piece.layout.view(fused if "weight" in piece.tensor else bias)
        for piece in detected.plan.pieces
        if piece.tensor.startswith(at)
    }
    # As the published code splits it: into heads first, then 4, 2 and 2 of them.
    heads = fused.reshape(8, 8, 16)
    for name, head in (("query", heads[:4]), ("key", heads[4:6]), ("value", heads[6:])):
        np.testing.assert_array_equal(parts[f"attention.{name}"], head.transpose(2, 0, 1))
        start = {"query": 0, "key": 32, "value": 48}[name]
        expected = bias[start : start + head.shape[0] * 8].reshape(-1, 8)
        np.testing.assert_array_equal(parts[f"attention.{name}_bias"], expected)
    assert len(parts) == 6


def test_a_fused_tensor_of_another_size(tmp_path: Path) -> None:
    config, shapes = ling()
    shapes["model.layers.0.attention.query_key_value.weight"] = [42, 16]
    with pytest.raises(UserError, match=r"query_key_value.* has shape .*42.*, not .*64"):
        detect(write_model(tmp_path / "ling", config, shapes))


V2: dict[str, Any] = {
    **{"architectures": ["BailingMoeV2ForCausalLM"], "use_qk_norm": True, "n_group": 2},
    **{"moe_router_enable_expert_bias": True, "score_function": "sigmoid", "topk_group": 1},
    **{"first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "rope_theta": 5e5},
}


def test_ling_2_is_sarvam_by_other_names(tmp_path: Path) -> None:
    """Compare with the family that transformers has, and that the parity suite runs."""
    config, shapes = ling(**V2)
    found = detect(write_model(tmp_path / "ling", config, shapes))
    assert found.family == "bailing_moe_v2"
    half = {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}
    other = config | {"model_type": "sarvam_moe", "architectures": ["Glm4MoeForCausalLM"]} | half
    known = detect(write_model(tmp_path / "sarvam", other, shapes))
    assert (found.settings, found.plan) == (known.settings, known.plan)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_head": True}, "norm_head=true is not computed here"),
        ({"architectures": ["Other"]}, "hf_family=bailing_moe or hf_family=bailing_moe_v2"),
    ],
)
def test_what_of_ling_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        detect(write_model(tmp_path / "ling", *ling(**changes)))


def recorded(family: str) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Return config.json and tensors of a small model as transformers wrote them."""
    with np.load(HERE / "recorded" / f"{family}.npz") as content:
        model = json.loads(str(content["model"]))
    return model["config"], {name: entry["shape"] for name, entry in model["tensors"].items()}


def test_a_whole_omni_is_its_thinker_and_what_is_carried(tmp_path: Path) -> None:
    config, shapes = recorded("qwen3_omni_moe_thinker")
    thinker = detect(write_model(tmp_path / "thinker", config, shapes))
    assert {name.split(".")[0] for name in thinker.plan.carried} == {"visual", "audio_tower"}
    whole = {"model_type": "qwen3_omni_moe", "thinker_config": config}
    inside = {f"thinker.{name}": shape for name, shape in shapes.items()}
    beside = {
        "talker.model.layers.0.mlp.gate.weight": [4, 2],
        "code2wav.code_embedding.weight": [3],
    }
    found = detect(write_model(tmp_path / "whole", whole, inside | beside))
    assert found.settings == thinker.settings
    assert {piece.tensor for piece in found.plan.pieces} == {
        f"thinker.{piece.tensor}" for piece in thinker.plan.pieces
    }
    assert {*found.plan.carried} == {
        *(f"thinker.{name}" for name in thinker.plan.carried),
        *beside,
    }


def test_kimi_vl_is_read_as_kimi_k25(tmp_path: Path) -> None:
    config, shapes = recorded("kimi_k25")
    known = detect(write_model(tmp_path / "k25", config, shapes))
    section = config["text_config"] | {"model_type": "kimi_k2"}
    renamed = {
        name.replace("mm_projector", "multi_modal_projector"): s for name, s in shapes.items()
    }
    other = config | {"model_type": "kimi_vl", "text_config": section}
    found = detect(write_model(tmp_path / "vl", other, renamed))
    assert (found.settings, found.plan.pieces) == (known.settings, known.plan.pieces)


def ernie(flat: bool = False) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Return a small ERNIE-VL as transformers wrote it, or with its authors' config.json."""
    config, shapes = recorded("ernie4_5_vl_moe")
    if not flat:
        return config, shapes
    section = dict(config["text_config"])
    section.pop("mlp_layer_types")
    experts = section["moe_num_experts"]
    return {
        **section,
        "model_type": "ernie4_5_moe_vl",
        "moe_num_experts": [experts, experts],
        "moe_layer_start_index": [1, 2],
        "moe_layer_end_index": [29, 28],
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "ernie_3d", "freq_allocation": 20},
        "rope_3d": True,
    }, shapes


def test_experts_of_images_are_carried_after_those_of_text(tmp_path: Path) -> None:
    config, shapes = ernie()
    found = detect(write_model(tmp_path / "vl", config, shapes))
    carried = {name for name in found.plan.carried if ".mlp." in name and ".layers." in name}
    experts = [f"experts.{n}.{part}_proj.weight" for n in range(8, 16) for part in PARTS]
    beside = (*experts, "gate.weight_1", "moe_statics.e_score_correction_bias")
    assert carried == {f"model.layers.{n}.mlp.{name}" for n in (1, 2) for name in beside}
    by_tensor = {piece.tensor: piece for piece in found.plan.pieces}
    assert carried & by_tensor.keys() == {
        f"model.layers.{n}.mlp.moe_statics.e_score_correction_bias" for n in (1, 2)
    }
    bias, kernel = np.arange(16).reshape(2, 8), np.arange(32 * 8).reshape(32, 8)
    of = "model.layers.2.mlp."
    layouts = [by_tensor[f"{of}{name}"].layout for name in (beside[-1], "gate.weight")]
    np.testing.assert_array_equal(layouts[0].view(bias), bias[0])
    np.testing.assert_array_equal(layouts[1].view(kernel), kernel)  # [M, E], as the parameter


def test_the_authors_config_of_ernie_vl_is_the_same_model(tmp_path: Path) -> None:
    known, other = (detect(write_model(tmp_path / str(f), *ernie(f))) for f in (False, True))
    assert (other.settings, other.plan) == (known.settings, known.plan)


def test_layers_without_experts_of_images_are_read(tmp_path: Path) -> None:
    config, shapes = ernie(flat=True)
    of = "model.layers.1.mlp."
    other = {f"{of}experts.{n}.{part}_proj.weight" for n in range(8, 16) for part in PARTS}
    shapes = {n: s for n, s in shapes.items() if n not in other and n != f"{of}gate.weight_1"}
    shapes[f"{of}moe_statics.e_score_correction_bias"] = [1, 8]
    carried = detect(write_model(tmp_path / "vl", config, shapes)).plan.carried
    assert not any(name.startswith(of) for name in carried)
    assert any(name.startswith("model.layers.2.mlp.") for name in carried)
    shapes[f"{of}experts.8.up_proj.weight"] = [8, 32]
    with pytest.raises(UserError, match=r"experts 0 to 8, .*moe_num_experts.*and 8 beside them"):
        detect(write_model(tmp_path / "odd", config, shapes))


@pytest.mark.parametrize("stacked", [False, True])
def test_both_spellings_of_nemotron(stacked: bool, tmp_path: Path) -> None:
    config, shapes = recorded("nemotron_h")
    known = detect(write_model(tmp_path / "published", config, shapes))
    renamed = {name.replace("backbone.", "model."): shape for name, shape in shapes.items()}
    if stacked:  # as transformers has them inside
        experts = [name for name in renamed if ".experts." in name]
        for name in experts:
            layer, _, (_, part, _) = (*name.partition(".experts.")[:2], name.rsplit(".", 2))
            renamed[f"{layer}.experts.{part}"] = [16, *renamed.pop(name)]
    found = detect(write_model(tmp_path / "inside", config, renamed))
    assert found.settings == known.settings
    assert {piece.tensor for piece in found.plan.pieces} == renamed.keys()  # exported as they came
    if not stacked:
        back = {n: n.replace("model.", "backbone.") for n in renamed}
        assert [(back[p.tensor], p.param, p.layout) for p in found.plan.pieces] == [
            (p.tensor, p.param, p.layout) for p in known.plan.pieces
        ]
    both = renamed | {"backbone.layers.0.norm.weight": [32]}
    with pytest.raises(UserError, match=r"backbone\.layers\.0.* have one role"):
        detect(write_model(tmp_path / "both", config, both))


def test_one_name_for_several_parameters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    names = "".join(f"  attention.{each}: attn.qkv.weight\n" for each in ("query", "key", "value"))
    path.write_text(f"based_on: mixtral\ntensors:\n{names}")
    with pytest.raises(UserError, match=r"query and .*key are both attn.*\n.*query_key_value"):
        load_family(str(path))


def test_the_outer_word_on_the_head_counts() -> None:
    assert untied({"tie_word_embeddings": False, "text": {"tie_word_embeddings": True}}) is None
    assert untied({"text": {"tie_word_embeddings": True}}) == {
        "text": {"tie_word_embeddings": False}
    }


def test_both_names_of_a_float8() -> None:
    for name in ("e4m3", "float8_e4m3fn"):
        content = {"quant_method": "fp8", "fmt": name, "weight_block_size": [128, 128]}
        assert read_scheme(content, WHERE) == Scheme("fp8", (128, 128))
