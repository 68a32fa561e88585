"""Read MaxText's models: each block as it is built there, or refused by what is missing here."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moe_shard.config import load_config
from moe_shard.config.load import maxtext_keys
from moe_shard.errors import UserError
from moe_shard.layers.rope import rope_frequencies
from tests.config.helpers import says
from tests.config.maxtext_files import DEEPSEEK, GPT_OSS, LLAMA4, SMALL, error, load, moe_of


@pytest.mark.parametrize(
    ("text", "dispatch", "factor"),
    [
        ("", "ragged", -1),
        ("megablox: false", "ragged", -1),
        ("capacity_factor: 1.5", "ragged", -1),  # for the dense path only
        ("sparse_matmul: false", "gather", -1),
        ("sparse_matmul: false\ncapacity_factor: 1.25\nmegablox: false", "gather", 1.25),
    ],
)
def test_what_chooses_the_dispatch(tmp_path: Path, text: str, dispatch: str, factor: float) -> None:
    config = load(tmp_path, f"decoder_block: mixtral\n{text}")
    assert (moe_of(config).moe_dispatch, moe_of(config).capacity_factor) == (dispatch, factor)
    ours = load(tmp_path, f"decoder_block: mixtral\n{text}", "moe_dispatch=einsum")
    assert moe_of(ours).moe_dispatch == "einsum"
    if "1.5" in text:
        says("\n".join(config.warnings), "decoder_block=mixtral does not read", "capacity_factor")


def test_scores_are_scaled_where_the_block_scales_them(tmp_path: Path) -> None:
    scales = {
        block: load(tmp_path, f"decoder_block: {block}").model.attention.attention_scale
        for block in ("llama2", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
    }
    assert {block for block, scale in scales.items() if scale == 1} == {
        *("llama2", "mistral", "mixtral")
    }
    assert set(scales.values()) == {1, -1}


def test_a_dense_block_has_no_experts_whatever_is_said(tmp_path: Path) -> None:
    config = load(tmp_path, "decoder_block: llama2")
    assert config.model.moe is None
    says("\n".join(config.warnings), "decoder_block=llama2 does not read these", "num_experts")


def test_keys_that_a_block_does_not_read(tmp_path: Path) -> None:
    extra = """
decoder_block: mixtral
use_qk_norm: true
attention_bias: true
first_num_dense_layers: 1
interleave_moe_layer_step: 2
shared_experts: 1
sliding_window_size: 8
attn_logits_soft_cap: 5
partial_rotary_factor: 0.5
routed_scaling_factor: 2
norm_topk_prob: false
final_logits_soft_cap: 30
"""
    plain, config = load(tmp_path, "decoder_block: mixtral"), load(tmp_path, extra)
    assert config.model == plain.model
    (line,) = [line for line in config.warnings if "does not read" in line]
    said = line.partition(": decoder_block=mixtral does not read these, here and there: ")[2]
    assert {*said.split(", "), "decoder_block"} == set(yaml.safe_load(extra))


def test_a_tied_table_normalises_its_logits(tmp_path: Path) -> None:
    tied = "decoder_block: mixtral\nlogits_via_embedding: true\nfinal_logits_soft_cap: 30"
    model = load(tmp_path, tied).model
    assert (model.logits_scaling, model.final_logits_soft_cap) == (8, 30)
    model = load(tmp_path, f"{tied}\nnormalize_embedding_logits: false").model
    assert model.logits_scaling == 1


def test_deepseek(tmp_path: Path) -> None:
    config = load(tmp_path, DEEPSEEK, name="deepseek3-small")
    moe, attention = moe_of(config), config.model.attention
    router = moe.router
    assert (router.routed_score_func, router.norm_topk_prob, router.routed_scaling_factor) == (
        *("sigmoid", True, 2.5),
    )
    assert (router.routed_bias, router.router_bias) == (True, False)
    assert (router.load_balance_probs, router.groups) == ("softmax", (1, 1))
    dense = load(tmp_path, DEEPSEEK + "sparse_matmul: false", name="deepseek3-small")
    assert moe_of(dense).router.load_balance_probs == "ranked"
    assert (moe.moe_mlp_dim, moe.shared_dim) == (32, 64)
    assert [kind.moe for kind in config.model.layer_kinds] == [False, True, True, True]
    assert (attention.attention_type, attention.latent_norm_epsilon, attention.attention_scale) == (
        "mla",
        1e-6,
        -1,
    )
    rope = attention.rope
    assert (rope.rope_type, rope.rope_interleave, rope.mscale, rope.rope_factor) == (
        "yarn",
        True,
        1,
        40,
    )

    grouped = DEEPSEEK + "n_routing_groups: 4\ntopk_routing_group: 2"
    router = moe_of(load(tmp_path, grouped, name="deepseek3-small")).router
    assert (router.groups, router.routing_group_score) == ((4, 2), "top2_sum")
    softmax = DEEPSEEK.replace("sigmoid", "softmax").replace("routed_bias: true", "")
    router = moe_of(load(tmp_path, softmax + "norm_topk_prob: true")).router
    assert (router.norm_topk_prob, router.routed_bias) == (False, False)


def test_deepseeks_routing_goes_by_the_models_name(tmp_path: Path) -> None:
    grouped = DEEPSEEK + "n_routing_groups: 4\ntopk_routing_group: 2"
    config = load(tmp_path, grouped)  # the file's name decides nothing
    assert moe_of(config).router.groups == (4, 2)
    says("\n".join(config.warnings), "as under a model_name of deepseek3")
    says(error(tmp_path, grouped + "\nmodel_name: ds"), "routed_bias=true", "deepseek3")
    plain = grouped.replace("routed_bias: true", "") + "\nmodel_name: deepseek2-x"
    assert moe_of(load(tmp_path, plain)).router.groups == (1, 1)


def test_what_a_latents_scores_are_multiplied_by(tmp_path: Path) -> None:
    def scale(extra: str) -> tuple[float, float]:
        attention = load(tmp_path, DEEPSEEK + extra).model.attention
        return attention.attention_scale, attention.rope.mscale

    assert scale("mscale: 0.7") == (-1, 0.7)
    assert scale("max_position_embeddings: 4096") == (-1, 0)
    found, mscale = scale("rope_type: default\nmscale: 0.5")
    assert mscale == 0
    by_hand = (128 + 64) ** -0.5 * (0.05 * math.log(40) + 1) ** 2
    assert found == pytest.approx(by_hand)


def llama_frequencies(dim: int, theta: float) -> np.ndarray:
    """Return Llama 3.1's frequencies, pair by pair: factor 8, 8192 positions, 1 and 4."""
    found = []
    for pair in range(dim // 2):
        frequency = theta ** (-2 * pair / dim)
        wave = 2 * math.pi / frequency
        if wave < 8192 / 4:
            found.append(frequency)
        elif wave > 8192:
            found.append(frequency / 8)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            found.append((1 - smooth) * frequency / 8 + smooth * frequency)
    return np.array(found)


def test_llama4(tmp_path: Path) -> None:
    config = load(tmp_path, LLAMA4, "base_num_decoder_layers=8", "head_dim=128")
    attention, router = config.model.attention, moe_of(config).router
    kinds = config.model.layer_kinds
    assert [(kind.span, kind.rope) for kind in kinds] == [
        *[("chunked", True)] * 3, ("global", False), *[("chunked", True)] * 3, ("global", False)
    ]  # fmt: skip
    assert all(kind.moe for kind in kinds)
    assert (router.routed_score_func, router.norm_topk_prob, router.routed_score_on_input) == (
        *("sigmoid", False, True),
    )
    assert router.load_balance_probs == "logits"
    assert (attention.use_qk_norm, attention.qk_norm_type) == (True, "l2")
    assert (attention.temperature_tuning, attention.temperature_tuning_floor) == (True, 8192)
    assert attention.chunk_attn_window_size == 8192
    assert attention.rope.rope_interleave
    found = rope_frequencies(attention.rope, turned_dim=128, length=100)
    np.testing.assert_allclose(found, llama_frequencies(128, 500_000), rtol=1e-12)

    every_other = LLAMA4 + "interleave_moe_layer_step: 2\nrope_use_scale: false"
    config = load(tmp_path, every_other, "use_qk_norm=false")
    assert [kind.moe for kind in config.model.layer_kinds] == [False, True] * 2
    rope = config.model.attention.rope
    assert (rope.rope_type, rope.rope_interleave) == ("default", True)
    assert not config.model.attention.use_qk_norm


def test_gpt_oss(tmp_path: Path) -> None:
    config = load(tmp_path, GPT_OSS)
    attention, gating = config.model.attention, config.model.gating
    assert [kind.span for kind in config.model.layer_kinds] == ["sliding", "global"] * 2
    assert (attention.attention_bias, attention.attention_out_bias, attention.attention_sink) == (
        True,
        True,
        True,
    )
    assert (
        gating.activation,
        gating.mlp_activations_limit,
        gating.mlp_linear_offset,
        gating.mlp_bias,
    ) == (*("quick_gelu", 7.0, 1.0, True),)
    router = moe_of(config).router
    assert (router.router_bias, router.routed_bias, router.norm_topk_prob) == (True, False, True)
    # Its experts have the size of a dense MLP, whatever the other key's value.
    assert moe_of(load(tmp_path, GPT_OSS + "base_moe_mlp_dim: 32")).moe_mlp_dim == 96
    says(error(tmp_path, GPT_OSS + "mlp_activations_limit: -1"), "another gate of gpt_oss")


def test_positions_of_the_other_blocks_are_halves_of_a_head(tmp_path: Path) -> None:
    for text in ("", "rope_interleave: true"):
        rope = load(tmp_path, f"decoder_block: mixtral\n{text}").model.attention.rope
        assert (rope.rope_type, rope.rope_interleave) == ("default", False)
    yarn = "decoder_block: qwen3_moe\nrope_type: yarn\nrope_interleave: false\nrope_factor: 8"
    rope = load(tmp_path, yarn).model.attention.rope
    assert (rope.rope_type, rope.rope_interleave, rope.rope_factor) == ("yarn", False, 8)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("decoder_block: envy", ["small asks for a norm after each MLP (decoder_block=envy)"]),
        ("decoder_block: deepseek4\nfirst_num_hash_layers: 3",
         ["compressed attention", "hash layers (first_num_hash_layers=3)"]),
        ("decoder_block: somebodys", ["layers of the kind somebodys"]),
        ("decoder_block: deepseek\nattention_type: mla\nuse_indexer: true\nq_lora_rank: 8\n"
         "routed_score_func: softmax\nindexer_mask_exact_topk: false",
         ["an indexer's choice of about, or of more than, indexer_topk tokens"]),
        ("decoder_block: qwen3_moe\nuse_multimodal: true\nuse_mrope: true",
         ["a vision tower (use_multimodal=true)", "M-RoPE"]),
        ("decoder_block: mixtral\nquantization: fp8", ["quantized products (quantization=fp8)"]),
        ("decoder_block: mixtral\nrouted_score_func: sigmoid", ["a sigmoid of the logits"]),
        ("decoder_block: deepseek\nattention_type: mla\nrouted_score_func: sqrtsoftplus",
         ["router weights by sqrtsoftplus"]),
        ("decoder_block: mixtral\nmlp_activations: [gelu]", ["another MLP"]),
        ("decoder_block: mixtral\nattention_type: mla", ["attention_type mla in its blocks"]),
        (DEEPSEEK + "mlp_activations_limit: 7", ["a clamp of routed experts alone"]),
        (DEEPSEEK + "mlp_bias: true", ["biases of routed experts alone"]),
        (DEEPSEEK + "attention_sink: true", ["attention sinks with latent attention"]),
        ("decoder_block: mixtral\ndropout_rate: 0.1", ["dropout (dropout_rate=0.1)"]),
        ("decoder_block: mixtral\nweight_dtype: float8_e4m3fn", ["float8 weights"]),
        ("decoder_block: mixtral\nopt_type: adam_pax", ["the optimizer adam_pax"]),
    ],
)  # fmt: skip
def test_a_model_that_is_not_here_is_refused_by_what_is_missing(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    says(error(tmp_path, text), *parts, "training would train another model")


def test_muon_and_moments_of_their_own_dtype(tmp_path: Path) -> None:
    text = "decoder_block: mixtral\nopt_type: muon\nmu_dtype: bfloat16\nmuon_consistent_rms: 0.2"
    train = load(tmp_path, text, "muon_weight_decay=0.1").train
    assert (train.optimizer, train.mu_dtype, train.muon_consistent_rms) == ("muon", "bfloat16", 0.2)
    # Their default is to include the routers, ours is not to.
    assert (train.muon_beta, train.muon_weight_decay, train.muon_include_routers) == (
        0.95,
        0.1,
        True,
    )
    train = load(tmp_path, "decoder_block: mixtral\nmu_dtype: float32\nweight_dtype: float32").train
    assert (train.mu_dtype, train.muon_consistent_rms) == ("", -1)
    says(error(tmp_path, "decoder_block: mixtral\nmuon_type: maxtext_muon"), "muon_type=optax_muon")


def test_what_is_asked_for_can_be_taken_back(tmp_path: Path) -> None:
    text = "decoder_block: mixtral\ndropout_rate: 0.1\nmoba: true\nopt_type: adam_pax"
    load(tmp_path, text, "enable_dropout=false", "moba=false", "opt_type=sgd").require_built()


def test_an_indexer_is_maxtexts(tmp_path: Path) -> None:
    text = DEEPSEEK + "q_lora_rank: 8\nuse_indexer: true\nindexer_n_heads: 3\nindexer_topk: 7\n"
    config = load(tmp_path, text + "indexer_sparse_training: true")
    config.require_built()
    found = config.model.attention
    told = (found.use_indexer, found.indexer_n_heads, found.indexer_topk, found.indexer_head_dim)
    assert told == (True, 3, 7, 128)
    says(error(tmp_path, text + "indexer_loss_scaling_factor: 0.1"), "a loss of the indexer")


def test_multi_token_prediction_is_maxtexts(tmp_path: Path) -> None:
    text = "decoder_block: mixtral\nmtp_num_layers: 2\nmtp_loss_scaling_factor: 0.3\n"
    config = load(tmp_path, text + "mtp_reuse_input_embedding: true")
    config.require_built()
    told = (config.model.mtp.mtp_num_layers, config.model.mtp.mtp_loss_scaling_factor)
    assert told == (2, 0.3)
    assert not config.model.mtp.mtp_after_final_norm
    says(error(tmp_path, text + "mtp_eval_target_module: 1"), "rates of acceptance")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("decoder_block: mixtral\nbase_moe_mlp_dim: 32", ["base_moe_mlp_dim=32", "wants them"]),
        ("decoder_block: mixtral\ninhomogeneous_layer_cycle_interval: 2", ["repeat every 1"]),
        (LLAMA4 + "interleave_moe_layer_step: 3", ["repeat every 12", "scan_layers=false"]),
        (LLAMA4 + "base_num_decoder_layers: 6", ["is no multiple", "builds 4"]),
        (GPT_OSS + "inhomogeneous_layer_cycle_interval: 1", ["repeat every 2"]),
    ],
)
def test_what_maxtext_would_build_otherwise_than_it_says(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    says(error(tmp_path, text), *parts)
    if "repeat" in parts[0]:
        load(tmp_path, f"{text}\nscan_layers: false\n").require_built()


def away_from(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [*value, "x"]
    return f"{value or ''}x"


@pytest.mark.parametrize("block", [DEEPSEEK, "decoder_block: mixtral"])
def test_no_key_is_passed_over_in_silence(tmp_path: Path, block: str) -> None:
    """Change each key: this gives another configuration, an error, or a line that names the key."""
    content = {**yaml.safe_load(SMALL), **yaml.safe_load(block), "enable_dropout": False}
    plain, silent, keys = load(tmp_path, block, "enable_dropout=false"), [], maxtext_keys()
    path = tmp_path / "small.yml"
    for key, default in keys.defaults.items():
        # One key stands for all that have no effect.
        if key in {*keys.harmless, *keys.implied, *keys.data} and not key.startswith("enable_"):
            continue
        other = {**content, key: away_from(content.get(key, default))}
        path.write_text(yaml.safe_dump(other), encoding="utf-8")
        try:
            config = load_config(str(path))
        except UserError:
            continue
        new = [line for line in config.warnings if line not in plain.warnings]
        same = dataclasses.replace(config, warnings=()) == dataclasses.replace(plain, warnings=())
        if same and not any(key in line for line in new):
            silent.append(key)
    # What it overrides is absent, and a key that already differs is set to its default.
    assert set(silent) <= {"override_logical_axis_rules", *content}
