"""Begin with the first layers of a checkpoint alone, on request, and export them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moe_shard.autoep.detect import detect
from moe_shard.autoep.directory import keep_hf
from moe_shard.checkpoints.imported import export_model, import_model
from moe_shard.checkpoints.resolve import load_model
from moe_shard.errors import UserError
from moe_shard.models.params import describe
from tests.autoep.checkpoints import BF16, read_file, write_file
from tests.autoep.directory import small_models, write_model
from tests.models.build import annotator

SMALL = small_models()
KEY = "base_num_decoder_layers"


def nested(config: dict[str, Any], section: str) -> dict[str, Any]:
    return config[section] if section else config


@pytest.mark.parametrize(
    ("name", "layers", "section"),
    [
        *(("mixtral-0", 1, ""), ("deepseek_v3-0", 2, ""), ("gpt_oss-0", 1, "")),
        *(("glm4_moe-0", 2, ""), ("qwen3_moe-0", 1, ""), ("ernie4_5_moe-0", 2, "")),
    ],
)
def test_the_first_layers_are_a_model_of_their_own(
    name: str, layers: int, section: str, tmp_path: Path
) -> None:
    model = SMALL[name]
    there = model["config"]["num_hidden_layers"]
    assert layers < there
    where = write_model(tmp_path / "model", model["config"], model["saved"])
    whole, found = detect(where), detect(where, layers=layers)
    kept = {
        tensor
        for tensor in model["saved"]
        if ".layers." not in tensor or int(tensor.split(".layers.")[1].split(".")[0]) < layers
    }
    assert found.headers.keys() == kept
    assert found.settings[KEY] == layers
    assert found.cut is not None
    assert nested(dict(found.cut), section)["num_hidden_layers"] == layers
    (line,) = [line for line in found.lines if "left out" in line]
    assert f"the first {layers} on request ({KEY}={layers})" in line
    assert f"{len(model['saved']) - len(kept)} tensors" in line
    # A directory that has no more than these is the same model.
    shapes = {tensor: model["saved"][tensor] for tensor in kept}
    alone = detect(write_model(tmp_path / "alone", found.cut, shapes))
    assert alone.settings == found.settings
    assert {*map(repr, alone.plan.pieces)} == {*map(repr, found.plan.pieces)}
    assert whole.cut is None
    assert detect(where, layers=there).settings == whole.settings


def test_a_config_json_that_was_cut_and_more_layers_than_there_are(tmp_path: Path) -> None:
    model = SMALL["deepseek_v3-0"]
    cut = model["config"] | {"num_hidden_layers": 2}
    where = write_model(tmp_path / "model", cut, model["saved"])
    with pytest.raises(UserError, match=rf"go on to layer 2(.|\n)*{KEY}=2 for these layers alone"):
        detect(where)
    assert detect(where, layers=2).settings[KEY] == 2
    with pytest.raises(UserError, match=rf"{KEY}=3\nfix: {KEY} of at most 2"):
        load_model(str(where), [f"{KEY}=3"])
    with pytest.raises(UserError, match=KEY):
        load_model(str(where), [f"{KEY}=0"])


def test_layers_of_multi_token_prediction_go_with_the_last_layers(tmp_path: Path) -> None:
    model = SMALL["deepseek_v3-0"]
    shapes = dict(model["saved"])
    for name in [name for name in shapes if ".layers.2." in name]:
        shapes[name.replace(".2.", ".3.", 1)] = shapes[name]
    shapes["model.layers.3.eh_proj.weight"] = [24, 48]
    where = write_model(tmp_path / "model", model["config"], shapes)
    assert len(detect(where, layers=3).plan.carried) > 1
    found = detect(where, layers=2)
    assert found.plan.carried == ()
    assert found.cut is not None
    assert found.cut["num_nextn_predict_layers"] == 0


def test_imported_and_exported_it_is_the_first_layers(tmp_path: Path) -> None:
    model, rng = SMALL["mixtral-0"], np.random.default_rng(0)
    (where := tmp_path / "model").mkdir()
    (where / "config.json").write_text(json.dumps(model["config"]))
    tensors = {
        name: (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(BF16)
        for name, shape in model["saved"].items()
    }
    write_file(where / "model.safetensors", tensors)
    config = load_model(str(where), [f"{KEY}=1", "num_simulated_devices=8"])
    assert config.model.num_decoder_layers == 1
    out = io.StringIO()
    console = Console(width=200, file=out)
    specs = describe(config.as_stored().model, annotator(config)).specs
    import_model(where, tmp_path / "imported", config, specs, console=console)
    assert "the first 1 layers alone" in out.getvalue()
    export_model(tmp_path / "imported", tmp_path / "out", console=console)
    found = read_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {name for name in tensors if ".layers.1." not in name}
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, tensors[name])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == model["config"] | {"num_hidden_layers": 1}
    # A run keeps the same as an import.
    (tmp_path / "run").mkdir()
    keep_hf(str(where), tmp_path / "run", layers=1)
    for name in ("config.json", "manifest.json"):
        kept = (tmp_path / "run" / "hf" / name).read_bytes()
        assert kept == (tmp_path / "imported" / "hf" / name).read_bytes()
