"""A decoder that processes a text in pieces has, after each, the logits of one whole call."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_shard.models.params import describe
from tests.layers.build import MLA, SMALL
from tests.models.build import (
    QUICK,
    annotator,
    assert_close,
    label,
    random_batch,
    random_params,
    small_config,
)

MODELS = {
    "alternating-spans": (
        "base_num_decoder_layers=4",
        "attention_pattern=[sliding, global]",
        "sliding_window_size=3",
        "attention_sink=true",
        "attention_bias=true",
        "attention_out_bias=true",
    ),
    "chunks-and-no-rope": (
        "base_num_decoder_layers=5",
        "attention_pattern=[chunked, global]",
        "chunk_attn_window_size=4",
        "nope_layer_interval=2",
        "use_qk_norm=true",
        "qk_norm_type=l2",
        "temperature_tuning=true",
        "temperature_tuning_floor=2",
    ),
    "mla": (*MLA, "q_lora_rank=8"),
    "states-and-one-block-layers": (
        "base_num_decoder_layers=4",
        "mixer_pattern=[gated_delta_net, attention, none, gated_delta_net]",
        "layers_without_mlp=[1, 3]",
        "gdn_num_key_heads=2",
        "gdn_num_value_heads=4",
        "gdn_key_head_dim=8",
        "gdn_value_head_dim=6",
        "gdn_chunk_size=4",
        "normalization_zero_centered=true",
    ),
}
TOKENS = 12


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2, "expert": 2}], ids=label)
@pytest.mark.parametrize("model", MODELS)
def test_pieces_and_the_whole_agree(model: str, sizes: dict[str, int]) -> None:
    config = small_config(sizes, *SMALL, *MODELS[model])
    described = describe(config.model, annotator(config))
    places = jax.tree.map(lambda spec: spec.sharding, described.specs)
    params = jax.device_put(random_params(config), places)
    batch = {name: a[0] for name, a in random_batch(tokens=TOKENS).items()}
    text = batch["inputs"], batch["positions"], batch["segment_ids"]
    whole, _ = jax.jit(lambda p, *text: described.apply(p)(*text), compiler_options=QUICK)(
        params, *text
    )
    cache = jax.jit(lambda p: described.apply(p).empty_cache(8, TOKENS + 4))(params)
    extend = jax.jit(lambda p, *args: described.apply(p).extend(*args), compiler_options=QUICK)
    first = 0
    for size in (5, 1, 1, 5):
        logits, cache = extend(params, *(each[:, first : first + size] for each in text), cache)
        first += size
        assert_close(np.asarray(logits), np.asarray(whole[:, first - 1]))
    assert cache.length == first == TOKENS
