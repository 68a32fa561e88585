"""Layers of multi-token prediction are read where asked for, carried otherwise, and exported."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from moe_shard.autoep.detect import detect
from moe_shard.checkpoints.imported import export_model, import_model, load_params
from moe_shard.checkpoints.resolve import load_model
from moe_shard.errors import UserError
from moe_shard.models.params import describe
from tests.autoep import oracle
from tests.autoep.checkpoints import BF16, Tensors, read_file, write_file
from tests.autoep.directory import small_models, write_model
from tests.models.build import annotator

SMALL = small_models()
ONE = "mtp_num_layers=1"


def shapes_of(name: str) -> tuple[dict[str, list[int]], int]:
    """Return the tensors of a model with an MTP layer, and the number of that layer."""
    model = SMALL[name]
    config, shapes = model["config"], dict(model["saved"])
    last, dim = config["num_hidden_layers"], config["hidden_size"]
    start = f"model.layers.{last}."
    for tensor in model["saved"]:
        if tensor.startswith(f"model.layers.{last - 1}."):
            shapes[start + tensor.split(".", 3)[3]] = shapes[tensor]
    for own in ("enorm", "hnorm", "shared_head.norm"):
        shapes[f"{start}{own}.weight"] = [dim]
    shapes[f"{start}eh_proj.weight"] = [dim, 2 * dim]
    for copy in ("embed_tokens", "shared_head.head"):
        shapes[f"{start}{copy}.weight"] = [config["vocab_size"], dim]
    return shapes, last


def write(directory: Path, name: str, **changed: Any) -> Tensors:
    """Write a checkpoint of a model whose MTP layer repeats the head and the embedding."""
    rng = np.random.default_rng(0)
    shapes, last = shapes_of(name)
    tensors = {
        tensor: (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(BF16)
        for tensor, shape in shapes.items()
    }
    start = f"model.layers.{last}."
    tensors[f"{start}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    if "lm_head.weight" in tensors:
        tensors[f"{start}shared_head.head.weight"] = tensors["lm_head.weight"]
    else:
        tensors[f"{start}shared_head.head.weight"] = tensors["model.embed_tokens.weight"]
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SMALL[name]["config"] | changed))
    write_file(directory / "model.safetensors", tensors)
    return tensors


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.recorded) for name in ("deepseek_v3-0", "glm4_moe-0")],
)
def test_imported_and_exported_it_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    where = tmp_path / "model"
    tensors = write(where, name)
    last = SMALL[name]["config"]["num_hidden_layers"]
    mesh = ("num_simulated_devices=8", "ici_data_parallelism=8", "ici_fsdp_parallelism=1")
    config = load_model(str(where), [ONE, *mesh])
    assert config.model.mtp.mtp_num_layers == 1
    assert config.model.mtp.mtp_after_final_norm
    assert any(line.startswith("multi-token prediction: 1 layer") for line in config.detected)
    console = Console(width=200, file=io.StringIO())
    specs = describe(config.as_stored().model, annotator(config)).specs
    import_model(where, tmp_path / "imported", config, specs, console=console)
    export_model(tmp_path / "imported", tmp_path / "out", console=console)
    found = read_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for tensor, values in found.items():
        np.testing.assert_array_equal(values, tensors[tensor], err_msg=tensor)
    params = load_params(str(tmp_path / "imported"), specs, say=lambda _: None)
    check_layer(jax.device_get(params["mtp"]), tensors, SMALL[name]["config"], last)


def check_layer(stack: Any, tensors: Tensors, config: dict[str, Any], last: int) -> None:
    """Compare the parameters of the MTP layer with those made of the tensors by hand."""
    start, dim = f"model.layers.{last}.", config["hidden_size"]
    expected = oracle.layer(dict(tensors), config, last)
    for ours, theirs in (
        ("embedding_norm", "enorm"),
        ("hidden_norm", "hnorm"),
        ("prediction_norm", "shared_head.norm"),
    ):
        expected[f"{ours}.scale"] = tensors[f"{start}{theirs}.weight"]
    joined = tensors[f"{start}eh_proj.weight"]
    expected["projection"] = np.stack([joined[:, :dim].T, joined[:, dim:].T])
    for path, values in jax.tree_util.tree_leaves_with_path(stack):
        role = jax.tree_util.keystr(path, simple=True, separator=".")
        np.testing.assert_array_equal(values[0], expected.pop(role), err_msg=role)
    assert not expected


def test_unasked_it_is_carried(tmp_path: Path) -> None:
    shapes, last = shapes_of("deepseek_v3-0")
    where = write_model(tmp_path / "model", SMALL["deepseek_v3-0"]["config"], shapes)
    found = detect(where)
    assert {*found.plan.carried} == {name for name in shapes if f".layers.{last}." in name}
    assert "mtp_num_layers" not in found.settings
    assert not load_model(str(where), ["mtp_num_layers=0"]).model.mtp_kinds
    read = detect(where, ahead=1)
    assert read.plan.carried == ()
    assert {piece.tensor for piece in read.plan.copies} == {
        f"model.layers.{last}.{copy}.weight" for copy in ("embed_tokens", "shared_head.head")
    }
    assert len(detect(where, layers=last).plan.carried) == len(found.plan.carried)
    assert detect(where, layers=last - 1).plan.carried == ()


def test_a_layer_that_is_not_there_or_has_a_head_of_its_own(tmp_path: Path) -> None:
    where = tmp_path / "model"
    tensors = write(where, "deepseek_v3-0", num_nextn_predict_layers=1)
    message = "mtp_num_layers=2, and there are 1 such layers by num_nextn_predict_layers=1\nfix: "
    with pytest.raises(UserError, match=f"{message}mtp_num_layers=1"):
        load_model(str(where), ["mtp_num_layers=2"])
    last = SMALL["deepseek_v3-0"]["config"]["num_hidden_layers"]
    name = f"model.layers.{last}.shared_head.head.weight"
    tensors[name] = np.array(tensors[name])
    tensors[name][1, 1] += 1
    write_file(where / "model.safetensors", tensors)
    with pytest.raises(UserError, match=rf"{name} is not lm_head(.|\n)*mtp_num_layers=0 carries"):
        load_model(str(where), [ONE])
    assert len(detect(where).plan.carried) > 1
    for lacking in (name, f"model.layers.{last}.embed_tokens.weight"):
        del tensors[lacking]
    write_file(where / "model.safetensors", tensors)
    assert detect(where, ahead=1).plan.copies == ()
    del tensors[f"model.layers.{last}.enorm.weight"]
    write_file(where / "model.safetensors", tensors)
    with pytest.raises(UserError, match=r"no tensor for embedding_norm\.scale of layer 3"):
        load_model(str(where), [ONE])
