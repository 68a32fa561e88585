"""What people give in place of a model is named, with the command that helps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_shard.autoep.detect import detect
from moe_shard.autoep.headers import read_headers
from moe_shard.autoep.not_a_model import hub_id
from moe_shard.checkpoints.imported import find_weights
from moe_shard.checkpoints.resolve import load_model
from moe_shard.errors import UserError
from tests.autoep.checkpoints import write_file
from tests.autoep.directory import small_models

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Access to this model is restricted</body></html>"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, ("a Git LFS pointer", "git lfs pull")),
        (PAGE, ("a web page", "hf auth login")),
        (b"\n<html lang='en'><head></head></html>", ("a web page", "hf auth login")),
        (b"GGUF\x03\x00\x00\x00" + b"\0" * 32, ("a GGUF file", "the model's own")),
        (b"PK\x03\x04" + b"\0" * 32, ("pickled weights", "save_pretrained")),
    ],
    ids=["lfs", "page", "page-again", "gguf", "pickle"],
)
def test_files_in_place_of_weights(content: bytes, words: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_headers(tmp_path)
    what, fix = str(caught.value).split("\nfix: ")
    assert words[0] in what
    assert "model.safetensors" in what
    assert words[1] in fix


def test_a_header_of_any_length_is_no_other_file(tmp_path: Path) -> None:
    """The bytes of a length may be those with which other files begin."""
    for length in range(0x0250, 0x0300):
        start, end = '{"__metadata__":{"note":"<html', '"}}'
        header = start + "x" * (length - len(start) - len(end)) + end
        data = length.to_bytes(8, "little") + header.encode()
        (tmp_path / "model.safetensors").write_bytes(data)
        assert read_headers(tmp_path) == {}


@pytest.mark.parametrize("reader", [load_model, find_weights])
def test_directories_of_something_else(reader: object, tmp_path: Path) -> None:
    assert callable(reader)
    made: dict[str, tuple[dict[str, str], list[str]]] = {
        "lora": (
            {"adapter_config.json": '{"base_model_name_or_path": "a/base"}'},
            ["a LoRA adapter of a/base", "merge_and_unload"],
        ),
        "strange": ({"adapter_config.json": "["}, ["a LoRA adapter of a model"]),
        "original": ({"params.json": '{"dim": 8}'}, ["params.json", "the Hugging Face directory"]),
        "gguf": ({"model-Q4_K_M.gguf": "GGUF"}, ["a GGUF file"]),
        "above": ({"model/config.json": "{}"}, ["in 1 of its folders", "above/model"]),
        "hub": (
            {"snapshots/abc/config.json": "{}", "refs/main": "abc", "blobs/1": ""},
            ["no config.json here", "hub/snapshots/abc"],
        ),
    }
    for name, (files, words) in made.items():
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        with pytest.raises(UserError) as caught:
            reader(str(tmp_path / name))
        assert all(word in str(caught.value) for word in words), caught.value
        assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("https://huggingface.co/Qwen/Qwen3-30B-A3B/", "Qwen/Qwen3-30B-A3B"),
        ("hf://allenai/OLMoE-1B-7B-0924", "allenai/OLMoE-1B-7B-0924"),
        ("models/mine.yml", None),
        ("../models/mine", None),
        ("a/b/c", None),
        ("mixtral-tiny", None),
        ("/mnt/models", None),
    ],
)
def test_names_on_the_hub(given: str, name: str | None) -> None:
    assert hub_id(given) == name
    if name is not None:
        with pytest.raises(UserError, match=f"fix: hf download {name} --local-dir"):
            load_model(given)


@pytest.mark.parametrize(
    "wrap",
    [
        "module.{}",
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "base_model.model.{}",
        "_forward_module.module.{}",
        "model._fsdp_wrapped_module.{rest}",
        "model.layers._checkpoint_wrapped_module.{deep}",
    ],
)
def test_what_wrappers_put_into_names_does_not_count(wrap: str, tmp_path: Path) -> None:
    model = small_models()["mixtral-0"]
    rng = np.random.default_rng(0)

    def wrapped(name: str) -> str:
        for part, before in (("{rest}", "model."), ("{deep}", "model.layers.")):
            if part in wrap:
                short = name.removeprefix(before)
                return wrap.replace(part, short) if short != name else name
        return wrap.format(name)

    found = []
    for name, rename in (("plain", str), ("wrapped", wrapped)):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(model["config"]))
        tensors = {
            rename(each): rng.normal(size=shape).astype(np.float32)
            for each, shape in model["saved"].items()
        }
        tensors[rename("model.layers.0.self_attn.rotary_emb.inv_freq")] = np.ones(3, np.float32)
        write_file(directory / "model.safetensors", tensors)
        found.append(detect(directory))
    plain, other = found
    assert [piece.param for piece in plain.plan.pieces] == [
        piece.param for piece in other.plan.pieces
    ]
    assert [wrapped(piece.tensor) for piece in plain.plan.pieces] == [
        piece.tensor for piece in other.plan.pieces
    ]
    assert len(other.plan.carried) == 1
    assert len(other.lines) == len(plain.lines) + 1
    assert other.lines[-1].startswith("names: ")
