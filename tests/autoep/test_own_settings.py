"""Set every key that a family file may set, one by one: it counts, or is refused by name."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_shard.autoep import family
from moe_shard.autoep.detect import detect
from moe_shard.autoep.family import load_family
from moe_shard.autoep.family_chain import SAID_BY
from moe_shard.autoep.param_shapes import slots_of
from moe_shard.checkpoints.resolve import load_model
from moe_shard.config.attention_config import AttentionConfig, RopeConfig
from moe_shard.config.eval_config import EvalConfig
from moe_shard.config.generate_config import GenerateConfig
from moe_shard.config.keys import leaf_keys
from moe_shard.config.load import LOADER_KEYS, base_settings
from moe_shard.config.mesh_config import MeshConfig
from moe_shard.config.model_config import GatingConfig, ModelConfig
from moe_shard.config.moe_config import MoEConfig, RouterConfig
from moe_shard.config.remat_config import RematConfig
from moe_shard.config.schema import Config, DataConfig, RunConfig, TrainConfig
from moe_shard.errors import UserError
from tests.autoep.directory import small_models, write_model

MODEL = small_models()["mixtral-0"]
SCHEMA = (
    *(AttentionConfig, RopeConfig, EvalConfig, GenerateConfig, MeshConfig, GatingConfig),
    *(ModelConfig, MoEConfig, RouterConfig, RematConfig, DataConfig, RunConfig, TrainConfig),
)
CHOICES = {key.name: key.choices for schema in SCHEMA for key in leaf_keys(schema).values()}
LISTS: dict[str, Any] = {
    "mlp_activations": ["gelu", "linear"],
    "attention_pattern": ["sliding", "global"],
    "dense_layers": [1],
    "mixer_pattern": ["mamba2"],
    "layers_without_mlp": [0],
    "nope_layers": [0],
    "rope_short_factors": [1.5] * 3,
    "rope_long_factors": [2.5] * 3,
    "dataset_path": ["there"],
    "eval_dataset_path": ["there"],
    "mesh_axes": ["expert", "data", "fsdp", "fsdp_transpose", "tensor", "context"],
    "logical_axis_rules": [["activation_batch", ["data", "fsdp"]]],
}
SLOTS = functools.cache(slots_of)
BESIDE: dict[str, dict[str, Any]] = {
    "sliding_window_size": {"attention_pattern": ["sliding"]},
    "chunk_attn_window_size": {"attention_pattern": ["chunked"]},
    "attention_pattern": {"sliding_window_size": 4},
}
"""What a setting means something with."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hf") / "model", MODEL["config"], MODEL["saved"])


@pytest.fixture(autouse=True)
def _shapes_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the parameters of a model, which most keys do not change."""
    monkeypatch.setattr("moe_shard.autoep.pieces.slots_of", SLOTS)


@pytest.fixture(scope="module")
def usual(directory: Path) -> dict[str, Any]:
    return load_model(str(directory)).as_flat_dict()


def another(key: str, value: Any) -> Any:
    """Return another value of a key."""
    if key in LISTS:
        return LISTS[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value + 0.25
    return next((choice for choice in CHOICES.get(key, ()) if choice not in (value, "")), "other")


def own_family(path: Path, settings: dict[str, Any], base: str = "mixtral", **keys: Any) -> str:
    """Write a family file; text is a value, not the name of an attribute."""
    rules = {
        key: {"value": value} if isinstance(value, str) else value
        for key, value in settings.items()
    }
    path.write_text(yaml.safe_dump({"based_on": base, "settings": rules, **keys}))
    return str(path)


def loaded(directory: Path, path: str) -> tuple[Config | None, str]:
    """Return the model's configuration, or the error."""
    try:
        return load_model(str(directory), [f"hf_family={path}"]), ""
    except UserError as error:
        text = str(error)
    assert "\nfix: " in text
    assert len(text.splitlines()) <= 3
    return None, text


@pytest.mark.parametrize("key", base_settings())
def test_a_setting_counts_or_is_refused_by_name(
    directory: Path, usual: dict[str, Any], tmp_path: Path, key: str
) -> None:
    value = another(key, usual.get(key, base_settings()[key]))
    assert value != usual.get(key)
    path = own_family(tmp_path / "own.yml", {key: value, **BESIDE.get(key, {})})
    config, error = loaded(directory, path)
    if config is None:
        assert key in error, error
        return
    found = config.as_flat_dict()[key]
    if key == "logical_axis_rules":  # its rules go before those of base.yml
        found = [rule for rule in found if rule in value]
    assert found == value or key in LOADER_KEYS


TWICE = [(setting, key) for setting, keys in SAID_BY.items() for key in keys]


def said_by(key: str) -> dict[str, Any]:
    """Return a family's keys with something said by one, or by an entry of one."""
    values = {
        **{"num_experts_attr": "num_local_experts", "top_k_attr": "num_experts_per_tok"},
        **{"score_func": "softmax", "score_apply": "post", "route_norm": True, "route_scale": 1.0},
        **{"num_expert_groups": -1, "num_limited_groups": -1, "spans.every": 1},
        **{"correction_bias_pattern": None, "shared_experts_gate_pattern": None},
        **{"moe_layers": {"first": "k"}, "attributes.rope_theta": 5.0},
        **{"mixers": {"otherwise": "mamba2"}, "mixers.names": {"x": "mamba2"}},
        **{"attributes.partial_rotary_factor": 1.0, "spans.nope_types": ["full_attention"]},
    }
    name, _, entry = key.partition(".")
    value = values.get(key, "sliding_window")
    return {name: {entry: value} if entry else value}


@pytest.mark.parametrize(("setting", "key"), TWICE, ids=" and ".join)
def test_a_thing_said_twice_is_refused_and_the_nearer_file_decides(
    tmp_path: Path, setting: str, key: str
) -> None:
    value, keys = another(setting, base_settings()[setting]), said_by(key)
    shared: dict[str, Any] = {"has_shared_experts": True} if setting == "shared_expert_gate" else {}
    with pytest.raises(UserError) as caught:
        load_family(own_family(tmp_path / "twice.yml", {setting: value}, **keys, **shared))
    assert f"settings.{setting} and {key} say one thing\nfix: keep one" in str(caught.value)
    # A family that is based on one with the setting, and says it by the key; and the reverse.
    below = own_family(tmp_path / "below.yml", {setting: value}, **shared)
    own = load_family(own_family(tmp_path / "own.yml", {}, base=below, **keys))
    assert setting not in own.settings
    below = own_family(tmp_path / "key.yml", {}, **keys, **shared)
    own = load_family(own_family(tmp_path / "set.yml", {setting: value}, base=below))
    assert own.settings[setting].default == value


@pytest.mark.parametrize(
    ("keys", "settings", "base", "said"),
    [
        ({}, {"shared_experts": 2}, "mixtral", "settings.shared_experts has no effect: has_shared"),
        ({"shared_expert_w1": "a"}, {}, "mixtral", "shared_expert_w1 has no effect: has_shared"),
        (
            {"has_shared_experts": False, "shared_experts_pattern": "s"},
            *({}, "qwen2_moe", "shared_experts_pattern has no effect"),
        ),
        ({"expert_fused_w1": "a"}, {}, "gpt_oss", "expert_fused_w1 has no effect: without"),
        ({"expert_w3": None, "expert_fused_w2": "a"}, {}, "mixtral", "fix: expert_w2: a"),
        ({}, {"hf_family": "x"}, "mixtral", "settings.hf_family has no effect: it is this file"),
        ({}, {"load_parameters_path": "x"}, "mixtral", "settings.load_parameters_path has no"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused(
    tmp_path: Path, keys: dict[str, Any], settings: dict[str, Any], base: str, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_family(own_family(tmp_path / "own.yml", settings, base=base, **keys))
    assert said in str(caught.value)


@pytest.mark.parametrize("key", base_settings())
def test_a_setting_of_another_type_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "own.yml"
    for value in (None, [None], "text"):
        if type(base_settings()[key]) is not type(value):
            with pytest.raises(UserError, match=rf"settings.{key}=.* is not (.|\n)*fix: "):
                family._read(path, "settings", {key: {"value": value}})


def test_a_familys_settings_lie_over_config_json(tmp_path: Path) -> None:
    """What `config.json` says of attention, positions and layers is replaced where it is said."""
    config = MODEL["config"] | {
        **{"sliding_window": 7, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        **{"rope_parameters": None, "rope_theta": 123.0, "max_position_embeddings": 64},
    }
    where, path = write_model(tmp_path / "model", config, MODEL["saved"]), tmp_path / "own.yml"
    usual = detect(where).settings
    assert (usual["attention_pattern"], usual["sliding_window_size"]) == (["sliding"], 7)
    own = own_family(path, {"attention_pattern": ["global", "sliding"]})
    found = detect(where, own).settings
    assert found == usual | {"attention_pattern": ["global", "sliding"]}
    own = own_family(path, {"attention_pattern": ["global"]})
    assert detect(where, own).settings["sliding_window_size"] == 0
    own = own_family(path, {"rope_type": "default", "rope_max_timescale": 9.0})
    found = detect(where, own).settings
    assert found["rope_max_timescale"] == 9.0
    assert not {key for key in found if key.startswith(("beta_", "rope_factor", "original_"))}
    own = own_family(path, {"rope_factor": 2.0})
    assert detect(where, own).settings == usual | {"rope_factor": 2.0}
    own = own_family(path, {"weight_dtype": "bfloat16", "dtype": "float32"})
    loaded_config, _ = loaded(where, own)
    assert loaded_config is not None
    assert loaded_config.as_stored().model.weight_dtype == "bfloat16"
    assert loaded_config.stored_dtype == ""
    # Only the embedding is stored, and the family says that the head is another.
    shapes = {name: at for name, at in MODEL["saved"].items() if name != "lm_head.weight"}
    tied = write_model(tmp_path / "tied", config | {"tie_word_embeddings": True}, shapes)
    own = own_family(path, {"logits_via_embedding": False})
    assert "no tensor for embedding.kernel" in loaded(tied, own)[1]


def test_what_config_json_makes_nothing_of_is_said(directory: Path, tmp_path: Path) -> None:
    path = own_family(
        tmp_path / "own.yml",
        {},
        attributes={"rms_norm_eps": 0.5, "hidden_act": "silu", "extra": 1},
        spans={"window": "slidding_window"},
        moe_layers={"first": "first_k"},
    )
    notes = detect(directory, path).notes
    assert (
        "attributes of family own that config.json has otherwise, which counts; under settings "
        "they would: rms_norm_eps=0.5 (config.json: 1e-05)"
    ) in notes
    assert (
        "attributes that family own names and neither it nor config.json has: "
        "spans.window: slidding_window, moe_layers.first: first_k"
    ) in notes
