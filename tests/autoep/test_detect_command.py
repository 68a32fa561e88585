"""Run `moe-shard detect` on small directories: what it shows is what their files hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe_shard.cli import command
from moe_shard.config.load import base_settings
from moe_shard.errors import UserError
from tests.autoep.directory import BYTES, small_models, write_model

SMALL = small_models()


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert command("detect")([str(each) for each in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["mixtral-0", "deepseek_v3-0", "llama4_text-0", "gpt_oss-0"])
def test_json_counts_what_is_in_the_files(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, shapes = SMALL[name]["config"], dict(SMALL[name]["saved"])
    shapes |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": [3] for n in range(2)}
    dtypes = {each: "F32" for each in shapes if each.endswith("inv_freq")}
    where = write_model(tmp_path / "model", config, shapes, dtypes=dtypes, files=2)
    (where / "vocab.json").write_text("{}")
    found: dict[str, Any] = json.loads(shown(capsys, where, "--json"))
    assert found["family"] == name.removesuffix("-0")
    layers = {key.split(".")[2] for key in shapes if key.startswith("model.layers.")}
    assert found["layers"]["all"] == len(layers)
    assert {*found["layers"]["with_experts"]} == {
        int(key.split(".")[2]) for key in shapes if "expert" in key and "shared" not in key
    }
    weights = {key: shape for key, shape in shapes.items() if key not in dtypes}
    assert found["parameters"] == sum(map(math.prod, weights.values()))
    assert found["tensors"]["all"] == len(shapes)
    assert found["tensors"]["used"] == len(weights)
    assert {*found["tensors"]["carried"]} == {*dtypes}
    assert found["stored"] == {
        "BF16": {"tensors": len(weights), "bytes": BYTES["BF16"] * found["parameters"]},
        "F32": {"tensors": 2, "bytes": 24},
    }
    assert found["bytes"] == sum(each["bytes"] for each in found["stored"].values())
    assert (found["files"], found["dtype"], found["quantization"]) == (2, "bfloat16", None)
    assert found["tied_head"] == ("lm_head.weight" not in shapes)
    assert found["dims"]["model"] == config["hidden_size"]
    assert found["dims"]["vocab"] == config["vocab_size"]
    assert found["settings"].keys() <= base_settings().keys()
    assert found["tokenizer"] is None
    text = shown(capsys, where)
    assert f"family: {found['family']}; layers: {len(layers)}" in text
    assert "tokenizer: none that is read; training on text asks for tokenizer_path" in text
    (where / "tokenizer.model").write_text("")
    assert "tokenizer: tokenizer.model\n" in shown(capsys, where)
    assert "parameters in float32" in text


@pytest.mark.parametrize("name", SMALL)
def test_a_config_alone_says_what_the_directory_says_but_for_its_tensors(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = write_model(tmp_path / "model", SMALL[name]["config"], SMALL[name]["saved"])
    whole: dict[str, Any] = json.loads(shown(capsys, where, "--json"))
    alone: dict[str, Any] = json.loads(shown(capsys, where / "config.json", "--json"))
    same = alone.keys() - {"config", "dtype"}
    assert {key: alone[key] for key in same} == {key: whole[key] for key in same}
    text = shown(capsys, where / "config.json")
    assert "by config.json alone" in text
    assert f"{whole['experts']['per_token']} a token" in text


@pytest.mark.parametrize("name", ["import", "export"])
def test_what_needs_weights_says_that_they_are_elsewhere(name: str, tmp_path: Path) -> None:
    where = write_model(tmp_path / "model", SMALL["mixtral-0"]["config"], {}) / "config.json"
    with pytest.raises(UserError) as caught:
        command(name)([str(where), str(tmp_path / "new")])
    assert str(caught.value).startswith(f"{where} is the model without its weights\nfix: a direc")
    assert not (tmp_path / "new").exists()


def test_what_training_refuses_is_refused(tmp_path: Path) -> None:
    model = SMALL["mixtral-0"]
    config = model["config"] | {"num_local_experts": 9}
    where = write_model(tmp_path / "model", config, model["saved"])
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="num_local_experts=9"):
        command("detect")([str(where)])
    with pytest.raises(UserError, match=r"no config\.json in it\nfix: a Hugging Face model"):
        command("detect")([str(empty)])
    with pytest.raises(UserError, match="hf download org/name"):
        command("detect")(["org/name"])
    with pytest.raises(UserError, match="no config"):
        command("detect")(["x" * 300])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, ["as gptq, 4 bits a weight", "hf download ID"]),
        ({"quant_method": "awq", "w_bit": 4}, ["as awq, 4 bits", "bfloat16 model that it was"]),
        ({"quant_method": "compressed-tensors"}, ["run_compressed=False", "save_pretrained(NEW)"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["dequantize() and save"]),
        ({"quant_method": "torchao"}, ["stored as torchao", "hf download ID"]),
        ({"quant_method": "new"}, ["stored as new", "convert the model to bfloat16"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_other_quantisations_are_refused_by_name(
    content: dict[str, Any], words: list[str], nested: bool, tmp_path: Path
) -> None:
    model = SMALL["mixtral-0"]
    config = {**model["config"], "quantization_config": content}
    if nested:
        config = {
            "text_config": model["config"],
            "quantization_config": content,
        }
    where = write_model(tmp_path / "model", config, model["saved"])
    path = tmp_path / "own.yml"
    path.write_text("based_on: mixtral\nconfig_section: text_config\n")
    with pytest.raises(UserError) as caught:
        command("detect")([str(where), *([f"hf_family={path}"] if nested else [])])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
