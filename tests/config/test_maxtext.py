"""Load MaxText's files: their keys, their defaults, and what they request that is not supported.

The files are written here, with MaxText's keys; tests/maxtext has those of the installed package.
The expected values are written by hand, from reading MaxText's layers.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_shard.config import Config, check_against_mesh, configs_dir, load_config
from moe_shard.config.load import base_settings, maxtext_keys
from moe_shard.config.maxtext_blocks import BLOCKS, OTHER_BLOCKS
from moe_shard.config.maxtext_model import translate_model
from moe_shard.config.maxtext_run import KEYS as RUN_KEYS
from moe_shard.config.moe_config import MoEConfig
from moe_shard.errors import UserError
from moe_shard.layers.rope import rope_frequencies
from tests.config.helpers import check_message, says

SMALL = """
base_emb_dim: 64
base_num_decoder_layers: 4
base_num_query_heads: 4
base_num_kv_heads: 2
base_mlp_dim: 96
base_moe_mlp_dim: 96
head_dim: 16
vocab_size: 320
num_experts: 8
num_experts_per_tok: 2
"""
DEEPSEEK = """
decoder_block: deepseek
attention_type: mla
first_num_dense_layers: 1
shared_experts: 2
routed_score_func: sigmoid
routed_bias: true
routed_scaling_factor: 2.5
normalization_layer_epsilon: 1e-6
rope_type: yarn
base_moe_mlp_dim: 32
"""
LLAMA4 = """
decoder_block: llama4
rope_type: llama3.1
rope_max_timescale: 500_000
use_qk_norm: true
num_experts_per_tok: 1
shared_experts: 1
nope_layer_interval: 4
inhomogeneous_layer_cycle_interval: 4
temperature_tuning: true
chunk_attn_window_size: 8192
"""
GPT_OSS = """
decoder_block: gpt_oss
attention_bias: true
attention_sink: true
sliding_window_size: 8
mlp_activations: [sigmoid, linear]
mlp_activations_limit: 7.0
mlp_bias: true
routed_bias: true
inhomogeneous_layer_cycle_interval: 2
"""


def load(folder: Path, text: str, *overrides: str, name: str = "small") -> Config:
    """Load a model file's configuration; later lines override the small model's."""
    content = {**yaml.safe_load(SMALL), **yaml.safe_load(text)}
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_config(str(path), overrides)


def error(folder: Path, text: str, *overrides: str, name: str = "small") -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides, name=name).require_built()
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    return message


def moe_of(config: Config) -> MoEConfig:
    assert config.model.moe is not None
    return config.model.moe


# ---------------------------------------------------------------- the data


def test_every_key_has_one_class_and_ours_are_among_those_that_are_kept() -> None:
    keys, base = maxtext_keys(), base_settings()
    classes = [
        *(keys.same, set(keys.translated), set(keys.implied)),
        *(set(keys.harmless), keys.data, set(keys.refused)),
    ]
    assert sum(map(len, classes)) == len(set().union(*classes)) == len(keys.defaults)
    assert keys.same <= set(base)
    # A key that both packages have must not be ignored or refused in a MaxText file.
    assert set(base) & set(keys.defaults) <= keys.same | set(keys.translated)
    assert all(other in keys for other in keys.implied.values() if other.isidentifier())
    assert not keys.logical_axes & {row[0] for row in base["logical_axis_rules"]}
    assert not set(keys.mesh_axes) & set(base["mesh_axes"])


class Recorded(Mapping[str, Any]):
    """Record which settings were read."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return self._settings[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)


def test_what_is_called_translated_is_read_by_the_translation() -> None:
    keys, read = maxtext_keys(), set[str]()
    for block in [*BLOCKS, *OTHER_BLOCKS]:
        for tied in (True, False):
            more: dict[str, object] = {
                "num_experts": 4,
                "logits_via_embedding": tied,
                "norm_topk_prob": False,
            }
            more |= {"rope_type": "yarn" if tied else "llama3.1", "decoder_block": block}
            more |= {"scan_layers": False, "dropout_rate": 0.5}
            recorded = Recorded({**keys.defaults, **more})
            translate_model(recorded, frozenset(more), "m", is_named=False)
            read |= recorded.read
    # megablox is the kernel of the path that sparse_matmul chooses.
    assert set(keys.translated) <= read | RUN_KEYS | {"megablox"}
    assert not RUN_KEYS & read
    assert set(keys.translated) >= RUN_KEYS


# ---------------------------------------------------------------- what is left out


def test_a_file_of_maxtexts_has_maxtexts_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, "decoder_block: mixtral")
    moe, train = moe_of(config), config.train
    assert (moe.moe_dispatch, moe.capacity_factor) == ("ragged", -1)
    assert (moe.load_balance_loss_weight, moe.load_balance_loss_type) == (0, "sequence")
    assert (train.adam_decay_vectors, train.learning_rate_rule) == (True, "maxtext")
    assert (train.steps, train.per_device_batch_size) == (150_001, 12)
    assert (train.checkpoint_period, train.log_period) == (10_000, 1)
    assert config.data.dataset_type == "synthetic"
    assert config.model.remat_policy == "full"
    assert config.run.base_output_directory == "outputs"
    assert not config.not_built
    notes = "\n".join(config.warnings)
    says(notes, "small.yml is read as a MaxText file", "steps=150001", "adam_decay_vectors=true")
    says(notes, "sparse_matmul=true: moe_dispatch=ragged")
    without = {k: v for k, v in yaml.safe_load(SMALL).items() if k != "head_dim"}
    path = tmp_path / "headless.yml"
    path.write_text(yaml.safe_dump({**without, "decoder_block": "mixtral"}), encoding="utf-8")
    assert load_config(str(path)).model.attention.head_dim == 128


@pytest.mark.parametrize(("tiles", "chunks"), [(1, -1), (4, 4)])
def test_one_tile_of_the_vocabulary_leaves_the_number_to_us(
    tmp_path: Path, tiles: int, chunks: int
) -> None:
    # 1 is MaxText's default, and all logits at once: never better than what is chosen here.
    config = load(tmp_path, f"decoder_block: mixtral\nnum_vocab_tiling: {tiles}")
    assert config.train.num_vocab_tiling == chunks


def test_a_file_of_ours_keeps_our_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, "steps: 3")
    assert (moe_of(config).moe_dispatch, config.data.dataset_type) == ("gather", "text")
    assert config.warnings == ()


def test_a_configuration_that_a_run_has_written_is_ours(tmp_path: Path) -> None:
    config = load(tmp_path, "decoder_block: mixtral", "steps=2")
    written = tmp_path / "config.yml"
    written.write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(str(written))
    assert dataclasses.replace(again, warnings=()) == dataclasses.replace(config, warnings=())
    assert again.warnings == ()
    # Also where it names a value that only MaxText has.
    written.write_text(config.to_yaml() + "compress_ratios: [0, 4]\n", encoding="utf-8")
    assert load_config(str(written)).not_built == ("compressed attention (compress_ratios=[0, 4])",)


# ---------------------------------------------------------------- the model


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


# ---------------------------------------------------------------- the run


def test_the_runs_keys(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
decoder_block: mixtral
opt_type: sgd
cosine_learning_rate_final_fraction: 0.2
learning_rate_schedule_steps: 40
steps: -1
init_weights_seed: 5
remat_policy: minimal
profiler: xplane
max_num_checkpoints_to_keep: None
enable_goodput_recording: false
dataset_type: synthetic
""",
    )
    train = config.train
    assert (train.optimizer, train.learning_rate_final_fraction, train.steps) == ("sgd", 0.2, 40)
    assert (train.seed, config.data.seed) == (5, 5)
    assert (config.model.remat_policy, train.profile) == ("minimal", True)
    assert train.max_num_checkpoints_to_keep == -1
    notes = "\n".join(config.warnings)
    says(notes, "of no meaning here: enable_goodput")


MIXTRAL = "decoder_block: mixtral"
REFUSED = [
    ("load_full_state_path=/x", ["load_full_state_path=/x", "load_parameters_path=PATH"]),
    ("hf_path=a/b", ["hf_path=a/b", "dataset_path=FILES"]),
    ("use_dpo=true", ["use_dpo=true asks for training on preferences or rewards"]),
    ("formatting_func_path=a.b", ["a function of its own that makes conversations"]),
    ("lora_weight_qtype=nf4", ["QLoRA"]),
    ("ici_pipeline_parallelism=2", ["pipeline parallelism", "ici_pipeline_parallelism=1"]),
    ("max_segments_per_seq=4", ["max_segments_per_seq=4"]),
    ("grain_train_files=/x", ["a dataset of MaxText's pipelines"]),
    ("lora_input_adapters_path=/x", ["lora_restore_path=a directory in peft's format"]),
    ("dense_init_scale=2", ["other first parameters"]),
    ("use_qwix_quantization=true", ["quantized products (qwix)"]),
    ("lr_schedule_type=wsd", ["lr_schedule_type=cosine"]),
]


@pytest.mark.parametrize(("override", "parts"), REFUSED)
def test_no_key_that_would_change_the_run_is_passed_over(
    tmp_path: Path, override: str, parts: list[str]
) -> None:
    says(error(tmp_path, MIXTRAL, override), *parts)
    with pytest.raises(UserError) as caught:  # nor with a model of this package
        load_config("mixtral-tiny", [override]).require_built()
    says(str(caught.value), *parts)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("dataset_type=tfds", ["dataset_type=tfds", "dataset_path=FILES"]),
        ("init_weights_seed=3", ["there is one seed here"]),
        ("profiler=perf", ["profiler=xplane"]),
        ("adamw_mask=[norm]", ["adam_decay_vectors=false"]),
        ("base_emb_dim=abc", ["command line: base_emb_dim=abc is not a whole number"]),
        ("base_emb_dim=6.5", ["is not a whole number"]),
        ("base_emb_dim=true", ["is not a whole number"]),
        ("rope_factor=[1]", ["rope_factor=[1] is not a number"]),
        ("sparse_matmul=2", ["sparse_matmul=2 is not true or false"]),
        ("mlp_activations=silu", ["mlp_activations=silu is not a list"]),
        ("nope_layer_interval={}", ["nope_layer_interval={} is not a whole number"]),
        ("decoder_block=[mixtral]", ["layers of the kind [mixtral]"]),
        ("num_experts=0", ["num_experts=0 is out of range"]),
        ("remat_policy=x", ["remat_policy=x is not a known remat_policy"]),
        ("scan_layer=true", ["unknown key scan_layer"]),
    ],
)
def test_wrong_values(tmp_path: Path, override: str, parts: list[str]) -> None:
    says(error(tmp_path, MIXTRAL + "\ndata_shuffle_seed: 2", override), *parts)


def test_data(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("text", encoding="utf-8")
    config = load(tmp_path, MIXTRAL + "\ntokenizer_path: there/llama", f"dataset_path={text}",
                  "tokenizer_path=")  # fmt: skip
    assert (config.data.dataset_type, config.data.dataset_path) == ("text", (str(text),))
    config = load(tmp_path, MIXTRAL + "\ntokenizer_path: there/llama\nadd_bos: false")
    assert (config.data.dataset_type, config.data.tokenizer_path) == ("synthetic", "")
    says("\n".join(config.warnings), "nothing is read from tokenizer_path", "add_bos")
    message = error(tmp_path, MIXTRAL + "\nadd_bos: false", f"dataset_path={text}")
    says(message, "add_bos=false asks for text read in another way", "add_bos=true")


@pytest.mark.parametrize(
    ("overrides", "paths"),
    [
        (["dataset_type=grain", "grain_train_files=/d/*.array_record"], ["/d/*.array_record"]),
        (["dataset_type=grain", "grain_train_files=/d/x*,1.0", "grain_file_type=parquet"],
         ["/d/x*"]),
        (["dataset_type=hf", "hf_path=parquet", "hf_train_files=/d/*.parquet"], ["/d/*.parquet"]),
        (["dataset_type=hf", "hf_path=json", "hf_train_files=[/a.jsonl, /b.jsonl]"],
         ["/a.jsonl", "/b.jsonl"]),
        (["dataset_type=hf", "hf_path={here}"], ["{here}"]),
        (["dataset_type=hf", "hf_path={here}", "hf_data_dir=fr"], ["{here}/fr"]),
    ],
)  # fmt: skip
def test_the_files_of_its_pipelines_are_the_text(
    tmp_path: Path, overrides: list[str], paths: list[str]
) -> None:
    here = str(tmp_path)
    given = [each.replace("{here}", here) for each in overrides]
    more = ["train_data_columns=[body]", "tokenizer_path=/t", "train_split=test"]
    data = load(tmp_path, MIXTRAL, *given, *more).data
    assert data.dataset_path == tuple(each.replace("{here}", here) for each in paths)
    assert (data.dataset_type, data.train_data_columns) == ("text", ("body",))
    assert (data.tokenizer_path, data.train_split) == ("/t", "test")


def test_its_fine_tuning_trains_on_what_it_does_there(tmp_path: Path) -> None:
    files = ["dataset_type=hf", f"hf_path={tmp_path}", "train_data_columns=[messages]"]
    more = ["use_sft=true", "tokenizer_path=/t", "chat_template_path=a.jinja"]
    data = load(tmp_path, MIXTRAL, *files, *more).data
    assert (data.use_sft, data.train_data_columns) == (True, ("messages",))
    assert data.chat_template_path == "a.jinja"
    assert not data.sft_train_on_completion_only  # MaxText's default; ours is true
    narrow = load(tmp_path, MIXTRAL, *files, *more, "sft_train_on_completion_only=true").data
    assert narrow.sft_train_on_completion_only


def test_its_mixtures(tmp_path: Path) -> None:
    data = load(tmp_path, MIXTRAL, "dataset_type=grain", "grain_train_files=/a*,0.3;/b*, 0.7").data
    assert (data.dataset_path, data.dataset_weights) == (("/a*", "/b*"), (0.3, 0.7))
    path = tmp_path / "mixture.json"
    path.write_text('{"x": {"path": "/c", "weight": 2}, "y": {"path": "/d", "weight": 1}}')
    data = load(tmp_path, MIXTRAL, "dataset_type=grain",
                f"grain_train_mixture_config_path={path}").data  # fmt: skip
    assert (data.dataset_path, data.dataset_weights) == (("/c", "/d"), (2.0, 1.0))


def test_its_block_of_lora(tmp_path: Path) -> None:
    block = "\nlora: {enable_lora: true, lora_rank: 4, lora_alpha: 8.0, lora_weight_qtype: null}"
    lora = load(tmp_path, MIXTRAL + block).model.lora
    assert (lora.enable_lora, lora.lora_rank, lora.lora_alpha, lora.scale) == (True, 4, 8.0, 2.0)
    wanted = "\nlora: {enable_lora: true, lora_rank: 4, lora_alpha: 8.0, lora_weight_qtype: nf4}"
    says(error(tmp_path, MIXTRAL + wanted), "QLoRA")
    twice = error(tmp_path, MIXTRAL + block + "\nlora_rank: 8")
    says(twice, "lora_rank is 4 in the block lora and 8 beside it")
    says(error(tmp_path, MIXTRAL + "\nlora: [1]"), "lora=[1] is no block of keys")
    says(error(tmp_path, MIXTRAL + "\nlora: {lora_rank: 4}"), "lora_rank=4 has no effect")


def test_adapters_that_a_file_leaves_open_are_said_to_be_others(tmp_path: Path) -> None:
    block = "\nlora: {enable_lora: true, lora_rank: 4, lora_alpha: 8.0"
    lines = load(tmp_path, MIXTRAL + block + "}").warnings
    says("\n".join(lines), "lora_module_path is empty: attention, experts and MLPs")
    plain = load(tmp_path, MIXTRAL + block + ", lora_module_path: self_attention/query}")
    assert not any("lora_module_path" in line for line in plain.warnings)


SFT = [
    ("use_sft=false", {"use_sft": False}),
    ("sft_train_on_completion_only=true", {"sft_train_on_completion_only": True}),
    ("chat_template_path=b.json", {"chat_template_path": "b.json"}),
    ("train_data_columns=[prompt, completion]", {"train_data_columns": ("prompt", "completion")}),
    ("train_split=train_sft", {"train_split": "train_sft"}),
    ("packing=false", {"packing": False}),
    ("formatting_func_kwargs={a: 1}", "formatting_func_kwargs"),
    ("use_grpo=true", "training on preferences or rewards"),
    ("dpo_beta=0.1", "of no meaning here: dpo_beta"),
    ("dpo={algo: orpo}", "of no meaning here: dpo"),
    ("use_tunix_gradient_accumulation=true", "use_tunix_gradient_accumulation (microbatches"),
    ("hf_lora_adapter_path=/x", "lora_restore_path=a directory"),
    ("lora_tile_size=32", "QLoRA"),
    ("quantize_router_proj=false", "of no meaning here: quantize_router_proj"),
]


@pytest.mark.parametrize(("override", "expected"), SFT)
def test_no_key_of_its_fine_tuning_is_dropped_in_silence(
    tmp_path: Path, override: str, expected: str | dict[str, Any]
) -> None:
    """It reaches the configuration, or a line or an error names it."""
    files = ["dataset_type=hf", f"hf_path={tmp_path}", "train_data_columns=[messages]"]
    given = [*files, "use_sft=true", "tokenizer_path=/t", override]
    if isinstance(expected, dict):
        data = load(tmp_path, MIXTRAL, *given).data
        assert {key: getattr(data, key) for key in expected} == expected
        return
    try:
        lines: tuple[str, ...] = load(tmp_path, MIXTRAL, *given).warnings
    except UserError as refusal:
        lines = (str(refusal),)
    says("\n".join(lines), expected)


def test_the_evaluation_files_of_its_pipelines(tmp_path: Path) -> None:
    files = ["grain_train_files=/d", "grain_eval_files=/e", "eval_interval=5"]
    config = load(tmp_path, MIXTRAL, "dataset_type=grain", *files)
    assert config.data.eval_dataset_path == ("/e",)
    by_split = ["hf_path=" + str(tmp_path), "hf_eval_split=dev", "eval_interval=5"]
    config = load(tmp_path, MIXTRAL, "dataset_type=hf", *by_split)
    assert config.data.eval_dataset_path == (str(tmp_path),)
    assert config.data.eval_split == "dev"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["dataset_type=hf"], ["without hf_path"]),
        (["dataset_type=grain"], ["without grain_train_files"]),
        (["dataset_type=hf", "hf_path=allenai/c4"], ["hub", "hf download", "dataset_path=DIR"]),
        (["dataset_type=hf", "hf_path=org/x", "hf_train_files=a*"], ["hub"]),
        (["dataset_type=hf", "hf_path=json", "grain_train_files=a"], ["grain_train_files=a"]),
        (["dataset_type=grain", "grain_train_files=a,0.3;b"], ["b has no weight"]),
        (["dataset_type=grain", "grain_train_mixture_config_path=/none"], ["is no mixture"]),
        (["dataset_type=grain", "grain_train_files=a", "grain_file_type=tfrecord"], ["tfrecord"]),
        (["dataset_type=text", "hf_path=x"], ["hf_path=x", "dataset_type=text"]),
        (["dataset_type=grain", "grain_train_files=a", "train_data_columns=[a, b]"],
         ["not one field"]),
    ],
)  # fmt: skip
def test_what_is_not_read_of_its_pipelines_is_refused(
    tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    says(error(tmp_path, MIXTRAL, *overrides), *parts)


def test_our_keys_in_a_file_of_theirs(tmp_path: Path) -> None:
    config = load(tmp_path, MIXTRAL + "\nmoe_dispatch: einsum", "num_simulated_devices=3")
    assert (moe_of(config).moe_dispatch, config.mesh.num_simulated_devices) == ("einsum", 3)


def test_their_keys_beside_a_model_of_ours() -> None:
    config = load_config(
        "mixtral-tiny",
        *[["opt_type=sgd", "sparse_matmul=true", "init_weights_seed=4", "hardware=cpu",
           "capacity_factor=-1", "scan_layers=true", "profiler=xplane"]],
    )  # fmt: skip
    assert (config.train.optimizer, config.train.seed, config.train.profile) == ("sgd", 4, True)
    assert moe_of(config).moe_dispatch == "ragged"
    says(config.warnings[0], "hardware (devices, compilers and layouts of MaxText's own)")
    for override in (
        "decoder_block=gemma",
        "rope_use_scale=false",
        "normalize_embedding_logits=false",
    ):
        with pytest.raises(UserError) as caught:
            load_config("mixtral-tiny", [override])
        says(check_message(caught.value), override, "this model is none of them")


# ---------------------------------------------------------------- MaxText's form of a command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write base.yml, models/ and custom_mesh_and_rule/ in MaxText's layout."""
    keys = maxtext_keys()
    table = [
        ["embed_attn", ["fsdp"]], ["exp", "expert"], ["activation_exp", ["expert", "diloco"]],
        ["activation_batch_moe", ["data", "fsdp", "expert"]], ["embed", ["fsdp"]],
        ["activation_batch", ["data", "fsdp", "expert"]], ["layers", "stage"],
    ]  # fmt: skip
    base = {key: value for key, value in keys.defaults.items() if key not in keys.refused}
    del base["cosine_learning_rate_final_fraction"]  # of older releases
    base |= {"logical_axis_rules": table, "base_config": None}
    (tmp_path / "base.yml").write_text(yaml.safe_dump(base), encoding="utf-8")
    (tmp_path / "models").mkdir()
    model = SMALL + "decoder_block: mixtral\nnormalization_layer_epsilon: 1e-6\n"
    (tmp_path / "models" / "mixtral-small.yml").write_text(model, encoding="utf-8")
    (tmp_path / "custom_mesh_and_rule").mkdir()
    rules = """
mesh_axes: [data, stage, fsdp, tensor_transpose, expert]
data_sharding: [[data, stage, fsdp, expert]]
logical_axis_rules: [[exp, [expert]], [activation_exp, expert], [activation_kv, context],
  [activation_batch_moe, [data, stage, fsdp, expert]], [activation_batch, [data, fsdp, expert]],
  [embed, [fsdp, tensor_transpose, sequence]]]
"""
    (tmp_path / "custom_mesh_and_rule" / "pure-fsdp.yml").write_text(rules, encoding="utf-8")
    return tmp_path


def test_base_yml_and_a_models_name(folder: Path) -> None:
    command = str(folder / "base.yml"), ["model_name=mixtral-small", "steps=5", "vocab_size=99"]
    config = load_config(*command)
    moe = moe_of(config)
    assert (config.run.model_name, config.run.run_name) == ("mixtral-small", "mixtral-small")
    assert (moe.num_experts, config.model.emb_dim, config.model.vocab_size) == (8, 64, 99)
    assert (config.model.normalization_layer_epsilon, config.train.steps) == (1e-6, 5)
    assert config.model.attention.attention_scale == 1
    notes = "\n".join(config.warnings)
    says(notes, "over what models/mixtral-small.yml says", "override_model_config=true", "vocab")
    command[1].append("override_model_config=true")
    assert "over what" not in "\n".join(load_config(*command).warnings)
    # The file's table replaces the default; a logical axis without a rule is not sharded.
    assert config.mesh.axes_of("embed") == ("fsdp",)
    assert config.mesh.axes_of("activation_exp") == ("expert",)
    assert config.mesh.axes_of("mlp") == config.mesh.axes_of("layers") == ()
    assert config.mesh.axes_of("activation_batch_no_exp") == ("data", "fsdp")
    names = [name for name, _ in config.mesh.logical_axis_rules]
    assert names.index("activation_batch_no_exp") == names.index("activation_batch_moe") + 1
    says(notes, "no rule, so not sharded, as in MaxText", "stage")


def test_base_yml_alone_is_llama_2(folder: Path) -> None:
    config = load_config(str(folder / "base.yml"), ["steps=0"])
    assert config.model.moe is None
    assert (config.model.num_decoder_layers, config.model.emb_dim) == (16, 2048)


def test_a_models_name_that_is_not_there(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(str(folder / "base.yml"), ["model_name=mixtral-smal"])
    says(check_message(caught.value), "model_name=mixtral-smal", "did you mean mixtral-small")


def test_a_file_that_inherits(folder: Path) -> None:
    child = folder / "models" / "child.yml"
    child.write_text("base_config: mixtral-small.yml\nnum_experts: 4\n", encoding="utf-8")
    config = load_config(str(child))
    assert (moe_of(config).num_experts, config.model.emb_dim) == (4, 64)
    child.write_text("base_config: base.yml\nnum_experts: 4\n", encoding="utf-8")
    assert load_config(str(child)).model.emb_dim == 2048
    child.write_text("base_config: child.yml\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(str(child))
    says(check_message(caught.value), "base_config=child.yml")
    child.write_text("base_config: nowhere.yml\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(str(child))
    says(check_message(caught.value), "base_config=nowhere.yml is not beside it")


def test_a_run_in_a_file_of_its_own(folder: Path) -> None:
    run = folder / "gpu" / "models" / "run.yml"
    run.parent.mkdir(parents=True)
    said = "base_config: base.yml\nmodel_name: mixtral-small\nsteps: 7\nvocab_size: 5\n"
    run.write_text(said + "max_segments_per_seq: 32\nprofiler: nsys\nreuse_example_batch: 1\n")
    with pytest.raises(UserError) as caught:
        load_config(str(run))
    says(check_message(caught.value), "run.yml: max_segments_per_seq=32")
    config = load_config(str(run), ["max_segments_per_seq=-1"])
    assert (config.train.steps, config.model.vocab_size) == (7, 320)
    notes = "\n".join(config.warnings)
    says(notes, "models/mixtral-small.yml wins over run.yml, as in MaxText: not vocab_size=5")


def test_a_rule_table_of_theirs(folder: Path) -> None:
    config = load_config(
        str(folder / "base.yml"),
        ["model_name=mixtral-small", "custom_mesh_and_rule=pure-fsdp", "ici_expert_parallelism=2"],
    )
    assert config.mesh.axes_of("embed") == ("fsdp",)
    assert config.mesh.axes_of("activation_batch_moe") == ("data", "fsdp", "expert")
    assert config.mesh.axes_of("activation_batch_no_exp") == ("data", "fsdp")
    assert config.mesh.resolve(8)["fsdp"] == 4
    notes = "\n".join(config.warnings)
    says(notes, "read as size 1: stage, tensor_transpose, sequence", "data_sharding")
    # The same for a model of this package, by path.
    table = str(folder / "custom_mesh_and_rule" / "pure-fsdp.yml")
    ours = load_config("mixtral-tiny", [f"custom_mesh_and_rule={table}"])
    assert ours.mesh.logical_axis_rules == config.mesh.logical_axis_rules
    check_against_mesh(ours, ours.mesh.resolve(8))


def test_a_table_that_ragged_cannot_serve(folder: Path) -> None:
    rules = folder / "custom_mesh_and_rule" / "whole.yml"
    table = "[[exp, expert], [activation_exp, expert], [activation_batch_moe, [data, fsdp]]]"
    rules.write_text(f"data_sharding: [[fsdp]]\nlogical_axis_rules: {table}\n", encoding="utf-8")
    command = ["model_name=mixtral-small", "custom_mesh_and_rule=whole"]
    split = [*command, "ici_expert_parallelism=2"]
    base = str(folder / "base.yml")
    config = load_config(base, split)
    assert (moe_of(config).moe_dispatch, moe_of(config).capacity_factor) == ("gather", -1)
    says(config.warnings[-1], "moe_dispatch=gather instead", "no token is on one device of expert")
    assert moe_of(load_config(base, command)).moe_dispatch == "ragged"
    assert moe_of(load_config(base, [*split, "moe_dispatch=ragged"])).moe_dispatch == "ragged"
    rules.write_text(rules.read_text(encoding="utf-8").replace("[exp, expert]", "[exp, fsdp]"))
    says(load_config(base, split).warnings[-1], "moe_dispatch=gather instead")


def test_our_base_yml_and_a_models_name(tmp_path: Path) -> None:
    base = configs_dir() / "base.yml"
    config = load_config(str(base), ["model_name=mixtral-tiny", "steps=3"])
    assert dataclasses.replace(config) == load_config("mixtral-tiny", ["steps=3"])
    copy = tmp_path / "base.yml"
    shutil.copy(base, copy)
    assert load_config(str(copy), ["model_name=mixtral-tiny", "steps=3"]) == config
    with pytest.raises(UserError) as caught:
        load_config(str(base), ["model_name=mixtral-tin"])
    says(check_message(caught.value), "model_name mixtral-tin", "mixtral-tiny")


VALUES: st.SearchStrategy[object] = st.one_of(
    st.sampled_from([None, True, -1, 0, 3, 1.5, "None", "", [], {}, [[1]], "x", [None], 10**30]),
    st.text(max_size=4),
    st.lists(st.sampled_from(["silu", "linear", "fsdp", 1]), max_size=3),
)
NAMES = sorted(maxtext_keys().defaults)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3), st.sampled_from([*BLOCKS, "?"]))
def test_any_file_gives_a_config_or_a_user_error(
    tmp_path: Path, extra: dict[str, Any], block: str
) -> None:
    path = tmp_path / "any.yml"
    content = {**yaml.safe_load(SMALL), "decoder_block": block, **extra}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    try:
        config = load_config(str(path))
        check_against_mesh(config, config.mesh.resolve(8))
        yaml.safe_load(config.to_yaml())
    except UserError as caught:
        check_message(caught)
