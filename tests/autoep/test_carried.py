"""Carry what lies beside the decoder, and nothing that a layer computes with."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_shard.autoep.carried import plan_tensors
from moe_shard.autoep.detect import detect
from moe_shard.autoep.family import load_family
from moe_shard.autoep.headers import read_headers
from moe_shard.autoep.tensor_names import sort_names
from moe_shard.errors import UserError
from tests.autoep.directory import small_models, write_model

SMALL = small_models()
FAMILIES = sorted({name for name in SMALL if name.endswith("-0")})
MIXTRAL = SMALL["mixtral-0"]


def pattern_of(name: str) -> str:
    """Write a pattern of a name and of those that differ from it in numbers."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_pattern_carries_a_tensor_of_a_layer(name: str, tmp_path: Path) -> None:
    where = write_model(tmp_path / "model", SMALL[name]["config"], SMALL[name]["saved"])
    family, headers = load_family(name.removesuffix("-0")), read_headers(where)
    below = f"{family.prefix}{family.layers[0]}."
    kinds = {pattern_of(tensor): tensor for tensor in headers if tensor.startswith(below)}
    assert len(kinds) > 8
    for pattern, tensor in kinds.items():
        own = replace(family, carried=(pattern,), own={"carried": [pattern]})
        names = sort_names(headers, own, where)
        with pytest.raises(UserError) as caught:
            plan_tensors((), (), headers, names, own, set(), where)
        first = str(caught.value).splitlines()[0]
        assert "is of a decoder layer, and carried: " + pattern in first
        assert re.search(pattern, first), tensor


EXTRAS = (
    *("self_attn.q_norm.weight", "self_attn.k_gain", "self_attn.rotary_emb.weight"),
    *("self_attn.inv_freq", "mlp.extra_proj.weight", "pre_feedforward_layernorm.weight"),
    *("self_attn.q_proj.lora_A.weight", "self_attn.qkv_proj.weight", "input_layernorm.bias"),
    *("block_sparse_moe.shared_expert.up_proj.weight", "block_sparse_moe.gate.bias"),
    *("linear_attn.A_log", "self_attn.indexer.wk.weight", "layer_scalar"),
)


def detected(tmp_path: Path, extra: dict[str, Any], carried: str = "", dtype: str = "BF16") -> Any:
    """Detect a Mixtral with more tensors, by a family that carries a pattern."""
    shapes = MIXTRAL["saved"] | extra
    where = write_model(
        tmp_path / "model", MIXTRAL["config"], shapes, dtypes=dict.fromkeys(extra, dtype)
    )
    if not carried:
        return detect(where)
    path = tmp_path / "own.yml"
    path.write_text(yaml.safe_dump({"based_on": "mixtral", "carried": [carried]}))
    return detect(where, str(path))


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_a_layer_has_beside_its_parameters_is_refused(extra: str, tmp_path: Path) -> None:
    name = f"model.layers.1.{extra}"
    with pytest.raises(UserError) as caught:
        detected(tmp_path, {name: [24]})
    text = str(caught.value)
    assert name in text
    assert "carried" not in text
    assert len(text.splitlines()) == 3 or "in settings of family mixtral" in text
    for carried in (pattern_of(name), r".*\.layers\.\d+\..*", ".*"):
        with pytest.raises(UserError, match="is of a decoder layer, and carried: "):
            detected(tmp_path, {name: [24]}, carried)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "F32"),
        ("model.layers.1.self_attn.rotary_emb.cos_cached", "F32"),
        ("model.layers.1.self_attn.rotary_emb.original_inv_freq", "F32"),
        ("model.layers.1.self_attn.bias", "BOOL"),
        ("model.visual.blocks.0.attn.qkv.weight", "BF16"),
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", "BF16"),
        ("multi_modal_projector.linear.weight", "BF16"),
    ],
)
def test_what_lies_beside_the_decoder_and_what_is_made_again_are_carried(
    name: str, dtype: str, tmp_path: Path
) -> None:
    found = detected(tmp_path, {name: [6]}, pattern_of(name), dtype)
    assert found.plan.carried == (name,)
    if "rotary" in name and "inv" in name and "original" not in name:
        assert detected(tmp_path, {name: [6]}, "", dtype).plan.carried == (name,)
    else:
        with pytest.raises(UserError, match=re.escape(name)):
            detected(tmp_path, {name: [6]}, "", dtype)
    if "layers" not in name:
        with pytest.raises(UserError, match="under carried where the decoder computes nothing"):
            detected(tmp_path, {name.replace("encoder.", "").replace(".layers", ""): [6]})
