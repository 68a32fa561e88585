"""Tied or not is decided by the tensors, and nothing of either is dropped or left behind."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_shard.autoep.detect import Detected, detect
from moe_shard.autoep.directory import keep_hf, lay_out_again
from moe_shard.autoep.exporting import export_params
from moe_shard.autoep.host_blocks import HostBlock
from moe_shard.autoep.tensor_plan import Piece
from moe_shard.errors import UserError
from tests.autoep.checkpoints import BF16, Tensors, read_file, write_file
from tests.autoep.directory import small_models

TABLE, HEAD = ("embedding", "table"), ("embedding", "kernel")
NESTED = {False: ("mixtral-0", ""), True: ("llama4_text-0", "language_model.")}
EMBEDDED, LOGITS = "model.embed_tokens.weight", "lm_head.weight"
WAYS = list(itertools.product((True, False), ("absent", "equal", "different"), (False, True)))


def write_model(
    directory: Path, tied: bool, saved: str, nested: bool, dtype: np.dtype[Any] = BF16
) -> Tensors:
    """Write a model with random tensors; the object around a nested decoder says what ties."""
    name, prefix = NESTED[nested]
    model = small_models()[name]
    rng = np.random.default_rng(0)
    tensors = {
        f"{prefix}{name}": rng.normal(size=shape).astype(dtype)
        for name, shape in model["saved"].items()
    }
    if saved == "equal":
        tensors[f"{prefix}{LOGITS}"] = tensors[f"{prefix}{EMBEDDED}"].copy()
    elif saved == "absent":
        del tensors[f"{prefix}{LOGITS}"]
    config = model["config"] | {"tie_word_embeddings": tied}
    if nested:
        section = {k: v for k, v in config.items() if k != "tie_word_embeddings"}
        config = {"model_type": "llama4", "tie_word_embeddings": tied, "text_config": section}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_file(directory / "model.safetensors", tensors)
    return tensors


def pieces_of(detected: Detected, tensor: str) -> list[Piece]:
    plan = detected.plan
    return [piece for piece in (*plan.pieces, *plan.copies) if piece.tensor.endswith(tensor)]


@pytest.mark.parametrize(("tied", "saved", "nested"), WAYS)
def test_the_tensors_decide(tied: bool, saved: str, nested: bool, tmp_path: Path) -> None:
    write_model(tmp_path / "model", tied, saved, nested)
    if saved == "absent" and not tied:
        with pytest.raises(UserError, match=r"no tensor for embedding\.kernel"):
            detect(tmp_path / "model")
        return
    detected = detect(tmp_path / "model")
    one = saved != "different"
    assert detected.settings["logits_via_embedding"] == one
    heads = pieces_of(detected, LOGITS)
    assert [piece.param for piece in heads] == {
        "absent": [],
        "equal": [TABLE],
        "different": [HEAD],
    }[saved]
    assert not detected.plan.carried
    said = [line for line in detected.lines if line.startswith("head: ")]
    assert len(said) == (saved != "absent" and one != tied)


@pytest.mark.parametrize(("tied", "saved", "nested"), WAYS)
def test_an_export_has_what_was_trained(
    tied: bool, saved: str, nested: bool, tmp_path: Path
) -> None:
    if saved == "absent" and not tied:
        return  # refused above
    source, folder, target = (tmp_path / name for name in ("model", "run", "export"))
    tensors = write_model(source, tied, saved, nested)
    folder.mkdir()
    keep_hf(str(source), folder)
    one = detect(source).settings["logits_via_embedding"]
    trained = {name: (x.astype(np.float32) + 1).astype(BF16) for name, x in tensors.items()}
    target.mkdir()
    lines: list[str] = []
    layout = lay_out_again(folder / "hf", target, tied=one, say=lines.append)
    blocks = []
    for piece in layout.plan.pieces:
        values = piece.layout.view(trained[piece.tensor])
        bounds = (*((at, at + 1) for at in piece.index), *((0, size) for size in values.shape))
        values = values[(None,) * len(piece.index)]
        blocks.append(HostBlock(piece.param, values.shape, bounds, values))
    export_params(layout.plan, layout.headers, blocks)
    written = read_file(target / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, wanted in trained.items():
        np.testing.assert_array_equal(written[name], wanted, err_msg=name)
    config = json.loads((target / "config.json").read_text())
    assert config["tie_word_embeddings"] == (tied and one)
    assert len(lines) == (tied and not one)


def test_a_head_without_an_embedding_is_both(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "model", True, "equal", False)
    del tensors[EMBEDDED]
    write_file(tmp_path / "model" / "model.safetensors", tensors)
    (piece,) = pieces_of(detect(tmp_path / "model"), LOGITS)
    assert piece.param == TABLE


@pytest.mark.parametrize("asked", [True, False])
def test_a_person_decides_otherwise(asked: bool, tmp_path: Path) -> None:
    write_model(tmp_path / "equal", not asked, "equal", False)
    heads = pieces_of(detect(tmp_path / "equal", tied=asked), LOGITS)
    assert [piece.param for piece in heads] == [TABLE if asked else HEAD]
    write_model(tmp_path / "different", asked, "different", False)
    if asked:
        with pytest.raises(UserError, match=r"is not .*\n.*logits_via_embedding=false"):
            detect(tmp_path / "different", tied=True)


def test_weights_that_were_never_made_say_nothing(tmp_path: Path) -> None:
    for tied in (True, False):
        directory = tmp_path / str(tied)
        tensors = write_model(directory, tied, "equal", False)
        zeros = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
        write_file(directory / "model.safetensors", zeros)
        assert detect(directory).settings["logits_via_embedding"] == tied


def test_copies_may_have_two_dtypes(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "model", True, "equal", False)
    tensors[LOGITS] = tensors[LOGITS].astype(np.float32)
    write_file(tmp_path / "model" / "model.safetensors", tensors)
    detected = detect(tmp_path / "model")
    assert detected.settings["logits_via_embedding"]
    assert [piece.param for piece in pieces_of(detected, LOGITS)] == [TABLE]
