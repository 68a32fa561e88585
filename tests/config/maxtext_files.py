"""Write small files of MaxText's, and load them.

The expected values of the tests are written by hand, from reading MaxText's layers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from moe_shard.config import Config, load_config
from moe_shard.config.moe_config import MoEConfig
from moe_shard.errors import UserError

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


MIXTRAL = "decoder_block: mixtral"
