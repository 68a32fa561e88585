"""Read Gemma 4's config.json, as published and as saved; refuse what is not computed by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_shard.autoep.attributes import Attributes
from moe_shard.autoep.detect import detect
from moe_shard.autoep.family import load_family
from moe_shard.autoep.settings import model_settings
from moe_shard.errors import UserError
from tests.autoep.directory import write_model
from tests.autoep.test_newer_families import recorded

FULL, SLIDING = "full_attention", "sliding_attention"
TEXT: dict[str, Any] = {
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
}


def settings(**changes: Any) -> dict[str, Any]:
    """Return the settings of a decoder alone; ... leaves an attribute out."""
    written = {name: value for name, value in (TEXT | changes).items() if value is not ...}
    family = load_family("gemma4_text")
    return model_settings(Attributes(written, family, Path("config.json")), family)


def of_full(*names: str, **changes: Any) -> tuple[Any, ...]:
    return tuple(settings(**changes)[name] for name in names)


WIDTHS = ("global_head_dim", "global_num_kv_heads", "share_kv_projections")
WIDE = {"head_dim": 48, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (512, 0, False)),
        ({"global_head_dim": 32, "num_global_key_value_heads": 2}, (32, 0, False)),
        ({"num_global_key_value_heads": 2, "attention_k_eq_v": True}, (512, 2, True)),
        ({"attention_k_eq_v": True, "per_layer_config": {"1": WIDE, "3": WIDE}}, (48, 1, True)),
        ({"attention_k_eq_v": True, "per_layer_config": {"01": WIDE, "03": WIDE}}, (48, 1, True)),
        ({"per_layer_config": {}}, (0, 0, False)),
    ],
)
def test_full_layers_have_heads_of_their_own(
    changes: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert of_full(*WIDTHS, **changes) == expected


def test_what_is_left_out_or_null_is_as_the_class_has_it() -> None:
    positions = ("rope_type", "rope_max_timescale", "local_rope_max_timescale")
    for rope in (..., None):
        assert of_full(*positions, rope_parameters=rope) == ("proportional", 1e6, 1e4)
    found = settings(layer_types=..., num_hidden_layers=12)
    assert found["attention_pattern"] == ["sliding"] * 5 + ["global"]
    assert settings(hidden_size=2816)["embedding_multiplier"] == 2816**0.5
    assert settings()["final_logits_soft_cap"] == 0.0


def rope(**of_sliding: Any) -> dict[str, Any]:
    full = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    sliding = {"rope_type": "default", "rope_theta": 1e4, **of_sliding}
    return {"rope_parameters": {FULL: full, SLIDING: sliding}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input=256 is not computed"),
        ({"hidden_size_per_layer_input": ...}, "hidden_size_per_layer_input=256 is not computed"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers=2 is not computed"),
        ({"use_bidirectional_attention": "all"}, 'attention="all" is not computed'),
        ({"enable_moe_block": ...}, "enable_moe_block=false is not computed"),
        ({"layer_types": [FULL, SLIDING] * 2}, "the last of 4 layers is sliding"),
        ({"layer_types": ..., "num_hidden_layers": 4}, "the last of 4 layers is sliding"),
        ({"per_layer_config": {"1": WIDE}}, "is not one for all layers of full_attention"),
        ({"per_layer_config": {"0": WIDE, "1": WIDE, "3": WIDE}}, "and for none besides"),
        ({"per_layer_config": {"1": {"sliding_window": 4}}}, "sliding_window of some layers"),
        ({"per_layer_config": [WIDE]}, "is not an object for each layer"),
        ({"per_layer_config": {"x": WIDE}}, '"x" is not the number of a layer'),
        ({"per_layer_config": {"1": WIDE, "01": WIDE, "3": WIDE}}, "the number of one layer twice"),
        (
            {"per_layer_config": {"1": WIDE, "3": WIDE}, "global_head_dim": 32},
            "global_head_dim=32 and per_layer_config say two things",
        ),
        (rope(rope_type="yarn"), 'sliding_attention.rope_type="yarn" is not computed'),
        (rope(partial_rotary_factor=0.5), "sliding_attention.partial_rotary_factor=0.5 is not"),
        (rope(rope_theta="1e4"), 'sliding_attention.rope_theta="1e4" is not a number'),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 2.0, "factor": 8.0}},
            "factor=8.0 of rope_type=proportional is not computed",
        ),
        ({"hidden_size": -4}, "hidden_size=-4 is out of range"),
        ({"hidden_activation": "tanh"}, 'hidden_activation="tanh" is not computed'),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        settings(**changes)
    assert "\nfix: " in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_layers_with_values_of_their_own_are_not_of_this_config(tmp_path: Path) -> None:
    config, shapes = recorded("gemma4")
    name = "model.language_model.layers.1.self_attn.v_proj.weight"
    assert name not in shapes
    extra = shapes | {name: [8, 32]}
    with pytest.raises(UserError, match=r"v_proj.*\n.*share_kv_projections"):
        detect(write_model(tmp_path / "more", config, extra))
    config["text_config"]["attention_k_eq_v"] = False
    with pytest.raises(UserError, match=r"k_proj.weight has shape \[8, 32\], not \[16, 32\]"):
        detect(write_model(tmp_path / "fewer", config, shapes))


def test_a_tensor_of_other_widths_is_named_with_the_attribute_of_full_layers(
    tmp_path: Path,
) -> None:
    config, shapes = recorded("gemma4")
    shapes["model.language_model.layers.3.self_attn.k_proj.weight"] = [4, 32]
    with pytest.raises(UserError, match="global_head_dim=8"):
        detect(write_model(tmp_path / "model", config, shapes))


def test_the_first_layers_keep_their_own_overrides_alone(tmp_path: Path) -> None:
    where = write_model(tmp_path / "model", *recorded("gemma4"))
    found = detect(where, layers=2)
    assert found.settings["attention_pattern"] == ["sliding", "global"]
    assert found.settings["global_head_dim"] == 8
    assert found.cut is not None
    assert [*found.cut["text_config"]["per_layer_config"]] == ["1"]
    assert len(found.cut["text_config"]["layer_types"]) == 2
    with pytest.raises(UserError, match="the last of 3 layers is sliding"):
        detect(where, layers=3)


def test_towers_are_carried(tmp_path: Path) -> None:
    found = detect(write_model(tmp_path / "model", *recorded("gemma4")))
    starts = {name.split(".")[1] for name in found.plan.carried}
    assert starts == {"vision_tower", "embed_vision"}


def test_overrides_of_layers_are_of_no_other_family(tmp_path: Path) -> None:
    config = json.loads(json.dumps({"per_layer_config": {"1": {"head_dim": 4}}}))
    with pytest.raises(UserError, match="head_dim of some layers is not computed"):
        Attributes(config, load_family("mixtral"), tmp_path / "config.json")
