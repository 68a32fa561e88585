"""Check that a config.json alone says what the whole directory says, for published models."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from moe_shard.autoep.param_shapes import count_parameters
from moe_shard.checkpoints.resolve import load_model
from moe_shard.config import list_models, load_config
from moe_shard.errors import UserError
from tests.autoep.directory import write_model
from tests.autoep.published import CONFIGS, tensors
from tests.autoep.published_settings import SETTINGS

SMALL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 288,
         "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8,
         "num_experts_per_tok": 2, "max_position_embeddings": 512}  # fmt: skip


ODD: tuple[Any, ...] = (
    *(None, True, "x", "1", "", 1.5, -1.5, 1e300, float("inf"), float("nan"), 0, -1, 3, 10**9),
    *(10**15, 10**400, [], [1], ["a"], [None], [[]], {}, {"a": 1}),
)
ODD_SIZES = (0, -2, 10**15, 10**400)


def write(folder: Path, settings: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_is_that_of_the_whole_directory(name: str, tmp_path: Path) -> None:
    shapes = tensors(name)
    float32 = {key: "F32" for key in shapes if "correction_bias" in key}
    whole = load_model(str(write_model(tmp_path / name, CONFIGS[name], shapes, dtypes=float32)))
    alone = load_model(str(write(tmp_path / "alone" / name, CONFIGS[name])))
    assert alone.model == whole.model
    assert whole.run.load_parameters_path
    assert not alone.run.load_parameters_path
    assert "no weights are read" in alone.detected[0]
    assert alone.run.run_name == whole.run.run_name


@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_the_model_of_configs_models(name: str, tmp_path: Path) -> None:
    assert name in list_models()
    family, settings = SETTINGS[name]
    found = load_model(str(write(tmp_path, {"model_type": family, **settings}))).model
    expected = load_config(name).model
    assert found.moe is not None
    assert expected.moe is not None
    assert found.layer_kinds == expected.layer_kinds
    assert (found.emb_dim, found.vocab_size) == (expected.emb_dim, expected.vocab_size)
    assert found.moe.num_experts == expected.moe.num_experts
    assert count_parameters(found) == count_parameters(expected)


def test_a_directory_without_weights_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    with pytest.raises(UserError) as caught:
        load_model(str(tmp_path))
    assert f"or {path}, for the model without its weights" in str(caught.value)


def test_fewer_layers_and_a_dtype_that_is_not_computed_in(tmp_path: Path) -> None:
    path = write(tmp_path, {**SMALL, "torch_dtype": "float8_e4m3fn"})
    config = load_model(str(path), ["base_num_decoder_layers=1"])
    assert (config.model.num_decoder_layers, config.model.dtype) == (1, "bfloat16")
    assert load_model(str(write(tmp_path, {**SMALL, "dtype": "float32"}))).model.dtype == "float32"
    with pytest.raises(UserError, match="at most 2, the layers that there are"):
        load_model(str(path), ["base_num_decoder_layers=3"])


def test_a_count_of_layers_that_no_memory_holds_is_refused_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, {**SMALL, "num_hidden_layers": 10**15})
    with pytest.raises(UserError, match=f"num_hidden_layers={10**15} is out of range\nfix: at mo"):
        load_model(str(path))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every object or list within, with each of its keys or its first two places."""
    for key in [*value] if isinstance(value, dict) else range(len(value[:2])):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@pytest.mark.parametrize("seed", range(20))
def test_any_value_at_any_place_is_read_or_refused(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    refused = []
    for _ in range(40):
        written = copy.deepcopy(CONFIGS[random.choice([*CONFIGS])])
        for _ in range(random.choice([1, 1, 2])):
            where, key = random.choice([*places(written)])
            where[key] = copy.deepcopy(random.choice(ODD))
        try:
            load_model(str(write(tmp_path, written)))
        except UserError as error:
            refused.append(str(error))
    assert refused
    assert [each for each in refused if each.count("\n") > 2 or len(each) > 1000] == []


@pytest.mark.parametrize("key", ["num_attention_heads", "hidden_size", "head_dim"])
@pytest.mark.parametrize("value", ODD_SIZES)
@pytest.mark.parametrize("name", ["mixtral-8x22b", "hunyuan-80b-a13b"])
def test_a_size_that_no_head_has_is_refused(
    name: str, value: int, key: str, tmp_path: Path
) -> None:
    family, settings = SETTINGS[name]
    with pytest.raises(UserError) as caught:
        load_model(str(write(tmp_path, {**settings, "model_type": family, key: value})))
    assert str(caught.value).count("\n") < 3


@pytest.mark.parametrize("around", [False, True])
def test_the_word_of_the_model_around_the_decoder_goes(tmp_path: Path, around: bool) -> None:
    """As transformers and a whole directory with a head have it, whatever the decoder's says."""
    whole = CONFIGS["Llama-4-Scout-17B-16E"]
    inner = whole["text_config"] | {"tie_word_embeddings": not around}
    path = write(tmp_path, {**whole, "text_config": inner, "tie_word_embeddings": around})
    assert load_model(str(path)).model.logits_via_embedding == around


@pytest.mark.recorded
def test_training_says_that_it_begins_from_random_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "model", {**SMALL, "num_hidden_layers": 1})
    done = subprocess.run(
        [sys.executable, "-m", "moe_shard.train", str(path), "steps=1", "tokenizer_path=bytes",
         "max_target_length=64", "enable_checkpointing=false", "num_simulated_devices=2"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "training would begin from random ones" in done.stdout
