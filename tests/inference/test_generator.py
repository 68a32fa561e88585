"""Compare generated tokens with those that NumPy generates, on meshes of every kind."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from moe_shard.checkpoints.convert import to_layout
from moe_shard.config import Config
from moe_shard.inference.generator import Generator
from moe_shard.inference.loading import SETTINGS
from moe_shard.inference.prompts import pad_left, rows_for
from moe_shard.models.params import Params, describe
from tests.models.build import (
    NO_DROPS,
    QUICK,
    annotator,
    architecture,
    label,
    random_params,
    small_config,
)
from tests.models.oracle import forward

NEW = 6
PROMPTS = [[5, 9, 2, 31, 7], [60], [12, 12, 40]]
MESHES = [
    {"fsdp": 8},
    {"expert": 2, "fsdp": 2, "tensor": 2},
    {"expert": 4, "data": 2},
    {"expert": 8},
]
KEYS = ("base_num_decoder_layers=2", f"max_new_tokens={NEW}")
WEIGHTED = "decode_sampling_strategy=weighted"
SOON = "moe_dispatch=gather"  # compiles in half the time


def writing(sizes: dict[str, int], *overrides: str) -> Config:
    return small_config(sizes, NO_DROPS, *KEYS, *SETTINGS, *overrides)


@functools.cache
def parameters() -> Params:
    """Return the parameters as the oracle reads them: gate and up separate."""
    return random_params(small_config({"data": 8}, NO_DROPS, *KEYS))


def write(
    config: Config,
    prompts: list[list[int]],
    *,
    cached: bool = True,
    vocab_size: int = 64,
) -> list[list[int]]:
    sharding = annotator(config)
    model = describe(config.model, sharding)
    wanted = jax.tree.map(lambda spec: spec.abstract(), model.specs)
    stored = describe(
        small_config(dict(sharding.mesh.shape), NO_DROPS, *KEYS).model, sharding
    ).specs
    params = jax.device_put(parameters(), jax.tree.map(lambda spec: spec.sharding, stored))
    generator = Generator(
        model,
        sharding,
        config.generate,
        vocab_size=vocab_size,
        rows=rows_for(config, dict(sharding.mesh.shape), len(prompts)),
        places=max(map(len, prompts)),
        cached=cached,
        options=QUICK,
    )
    found = np.stack(list(generator(to_layout(params, wanted), prompts)), axis=1)
    assert found.shape == (len(prompts), NEW)
    return found.tolist()


@functools.cache
def by_numpy() -> list[list[int]]:
    """Generate for each prompt alone, without padding or cache, in float64."""
    told = architecture(small_config({"data": 8}, NO_DROPS, *KEYS))
    texts = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(NEW):
            tokens = np.array([text])
            places, ones = np.arange(len(text))[None], np.ones_like(tokens)
            logits = forward(parameters(), tokens, places, ones, told).logits[0, -1]
            second, first = np.sort(logits)[-2:]
            assert first - second > 1e-3, "too close for float32 to tell"
            text.append(int(np.argmax(logits)))
        texts.append(text[len(prompt) :])
    return texts


@pytest.mark.parametrize("sizes", MESHES, ids=label)
def test_prompts_of_several_lengths_are_written_to_as_numpy_does_alone(
    sizes: dict[str, int],
) -> None:
    assert write(writing(sizes), PROMPTS) == by_numpy()


def test_without_the_cache_too() -> None:
    assert write(writing({"expert": 8}), PROMPTS, cached=False) == by_numpy()


@pytest.mark.parametrize("dispatch", ["gather", "einsum"])
def test_with_capacity_for_everything_too(dispatch: str) -> None:
    config = writing({"expert": 4, "data": 2}, f"moe_dispatch={dispatch}")
    assert write(config, PROMPTS) == by_numpy()


def test_a_prompt_alone_is_written_to_as_among_others() -> None:
    assert write(writing({"expert": 8}, SOON), PROMPTS[2:]) == by_numpy()[2:]


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_mesh_or_the_cache() -> None:
    drawn = write(writing({"expert": 8}, WEIGHTED, SOON), PROMPTS)
    assert drawn != by_numpy()
    assert write(writing({"expert": 2, "fsdp": 4}, WEIGHTED, SOON), PROMPTS) == drawn
    assert write(writing({"expert": 8}, WEIGHTED, SOON), PROMPTS, cached=False) == drawn
    assert write(writing({"expert": 8}, WEIGHTED, SOON, "seed=1"), PROMPTS) != drawn


def test_a_token_that_the_tokenizer_lacks_is_not_written() -> None:
    flat = "decode_sampling_temperature=100"
    drawn = write(writing({"expert": 8}, WEIGHTED, SOON, flat), [[1]] * 8, vocab_size=3)
    assert {token for text in drawn for token in text} == {0, 1, 2}


def test_several_kinds_of_layers_and_mla_keep_what_they_need() -> None:
    spans = ["attention_pattern=[sliding,chunked]", "sliding_window_size=3"]
    spans.append("chunk_attn_window_size=4")
    mla = ["attention_type=mla", "kv_lora_rank=16", "qk_nope_head_dim=8", "qk_rope_head_dim=4"]
    mla += ["v_head_dim=8", "base_num_kv_heads=8", "first_num_dense_layers=1"]
    for overrides in (spans, mla):
        texts = [
            _random(writing({"expert": 8}, SOON, *overrides), PROMPTS, cached=cached)
            for cached in (True, False)
        ]
        assert texts[0] == texts[1], overrides


def _random(config: Config, prompts: list[list[int]], *, cached: bool) -> list[list[int]]:
    sharding = annotator(config)
    model = describe(config.model, sharding)
    places = jax.tree.map(lambda spec: spec.sharding, model.specs)
    params = jax.device_put(random_params(config), places)
    generator = Generator(
        model,
        sharding,
        config.generate,
        vocab_size=64,
        rows=8,
        places=max(map(len, prompts)),
        cached=cached,
        options=QUICK,
    )
    return np.stack(list(generator(params, prompts)), axis=1).tolist()


def test_padding() -> None:
    padded = pad_left([[7, 8, 9], [5]], rows=3)
    assert padded.tokens.tolist() == [[7, 8, 9], [0, 0, 5], [7, 8, 9]]
    assert padded.positions.tolist() == [[0, 1, 2], [0, 0, 0], [0, 1, 2]]
    assert padded.segment_ids.tolist() == [[1, 1, 1], [0, 0, 1], [1, 1, 1]]
    assert padded.lengths.tolist() == [3, 1, 3]


def test_rows_divide_by_the_batch_axes() -> None:
    for sizes, expected in ({"expert": 8}, 8), ({"expert": 2, "tensor": 4}, 2), ({"tensor": 8}, 1):
        config = writing(sizes)
        mesh = dict(annotator(config).mesh.shape)
        assert [rows_for(config, mesh, prompts) for prompts in (1, expected, expected + 1)] == [
            expected,
            expected,
            2 * expected,
        ]
