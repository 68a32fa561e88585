"""Check models stored in few bits with scales against an independent decoder, on every path."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from moe_shard.autoep.dequantize import numbers, read
from moe_shard.autoep.detect import detect
from moe_shard.autoep.headers import TensorHeader, read_headers
from moe_shard.autoep.quantized import Quantized, read_scheme, with_scales
from moe_shard.checkpoints.imported import export_model, import_model, load_params
from moe_shard.checkpoints.resolve import load_model
from moe_shard.errors import UserError
from moe_shard.models.params import Params, describe
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.mesh import mesh_from_config
from moe_shard.sharding.rules import RuleTable
from tests.autoep.checkpoints import BF16, Tensors, read_file, write_file
from tests.autoep.directory import write_model
from tests.autoep.published import CONFIGS, tensors
from tests.autoep.quantize import (
    DEEPSEEK,
    E4M3,
    FP8,
    GPT_OSS,
    MXFP4,
    QWEN,
    decode_fp8,
    decode_mxfp4,
    is_fp8,
    make_quantized,
    write,
)
from tests.counted import counted

MODELS = {"fp8-one-by-one": DEEPSEEK, "fp8-qwen": QWEN, "mxfp4": GPT_OSS}


def one(tmp_path: Path, said: dict[str, Any], stored: Tensors) -> Quantized:
    """Return the only tensor of a file, with its scales."""
    write_file(tmp_path / "model.safetensors", stored)
    found = with_scales(read_headers(tmp_path), read_scheme(said, tmp_path), tmp_path)
    (entry,) = found.values()
    assert isinstance(entry, Quantized)
    return entry


@pytest.mark.parametrize("shape", [(16, 32), (19, 45), (3, 19, 45)], ids=str)
def test_every_number_of_fp8(shape: tuple[int, ...], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = np.arange(math.prod(shape)) % 256
    bits = rng.permutation(codes).astype(np.uint8).reshape(shape).view(E4M3)
    grid = (*shape[:-2], -(-shape[-2] // 8), -(-shape[-1] // 16))
    scales = rng.uniform(1e-4, 10, grid).astype(np.float32)
    said = FP8 | {"weight_block_size": [8, 16]}
    entry = one(tmp_path, said, {"w": bits, "w_scale_inv": scales})
    expected = decode_fp8(bits, scales, (8, 16))
    assert np.isnan(expected).any()
    found = numbers(entry)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    # NumPy does not recognise bfloat16's NaN.
    rounded = expected.astype(np.float32).astype(BF16).astype(np.float32)
    np.testing.assert_array_equal(read(entry).astype(np.float32), rounded)
    some = (slice(1, 2), slice(3, 17, 2), slice(5, 40))[-len(shape) :]
    np.testing.assert_array_equal(numbers(entry, some), found[some])


def test_every_number_of_mxfp4(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    blocks = np.stack([rng.permutation(256).astype(np.uint8) for _ in range(12)])
    blocks = blocks.reshape(3, 4, 16, 16)
    scales = np.concatenate([np.arange(255), [127] * 129])[: 3 * 4 * 16]
    scales = rng.permutation(scales).astype(np.uint8).reshape(3, 4, 16)
    entry = one(tmp_path, MXFP4, {"w_blocks": blocks, "w_scales": scales})
    assert entry.shape == (3, 512, 4)
    expected = decode_mxfp4(blocks, scales).astype(np.float32)
    found = numbers(entry)
    np.testing.assert_array_equal(found, expected)
    assert (np.signbit(found) == np.signbit(expected)).all()
    np.testing.assert_array_equal(read(entry), expected.astype(BF16))
    some = (slice(1, 3), slice(7, 200), slice(1, None, 2))
    np.testing.assert_array_equal(numbers(entry, some), expected[some])


def test_the_exponent_that_stands_for_no_number(tmp_path: Path) -> None:
    blocks, scales = np.full((1, 1, 1, 16), 0x22, np.uint8), np.full((1, 1, 1), 255, np.uint8)
    assert np.isnan(numbers(one(tmp_path, MXFP4, {"w_blocks": blocks, "w_scales": scales}))).all()


def specs_of(directory: Path, *overrides: str) -> tuple[Any, Params]:
    config = load_model(str(directory), ["num_simulated_devices=8", *overrides]).as_stored()
    sharding = Sharding(
        mesh_from_config(config.mesh), RuleTable(config.mesh.logical_axis_rules), "record"
    )
    return config, describe(config.model, sharding).specs


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make a quantized directory, the equivalent plain one, and the plain one's tensors."""
    folder = tmp_path_factory.mktemp("quantized")
    config = MODELS[request.param]
    stands_for = make_quantized(folder / "quantized", config)
    (folder / "plain").mkdir()
    write(folder / "plain", config, stands_for, 1)
    return folder / "quantized", folder / "plain", stands_for


MESHES = {
    "EP 8": ["ici_expert_parallelism=8"],
    "EP 2, FSDP 2, TP 2": [
        "ici_expert_parallelism=2", "ici_fsdp_parallelism=2", "ici_tensor_parallelism=2",
    ],
    "FSDP 8": ["ici_fsdp_parallelism=8"],
}  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_are_those_of_the_plain_model(made: Any, mesh: str) -> None:
    quantized, plain, _ = made
    for overrides in (MESHES[mesh], [*MESHES[mesh], "prefuse_moe_weights=true"]):
        _, specs = specs_of(quantized, *overrides)
        found, expected = (load_params(str(at), specs) for at in (quantized, plain))
        assert jax.tree.leaves(found)[0].dtype == BF16
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_an_export_is_the_plain_model(made: Any, tmp_path: Path) -> None:
    quantized, plain, stands_for = made
    imported, exported, again = (tmp_path / name for name in ("imported", "exported", "again"))
    console = Console(width=200, file=io.StringIO())
    config, specs = specs_of(quantized, "ici_expert_parallelism=4", "ici_fsdp_parallelism=2")
    import_model(quantized, imported, config, specs, console=console)
    export_model(imported, exported, console=console)
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert files == sorted(path.name for path in quantized.glob("*.safetensors"))
    found = {name: t for file in files for name, t in read_file(exported / file).items()}
    assert found.keys() == stands_for.keys()
    for name, tensor in stands_for.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].tobytes() == tensor.tobytes(), name
    config_json = json.loads((exported / "config.json").read_text())
    assert config_json == json.loads((plain / "config.json").read_text())
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stands_for.values())
    assert index["weight_map"].keys() == stands_for.keys()
    # The export is a model like any other: importing and exporting it again gives the same bytes.
    config, specs = specs_of(exported, "ici_expert_parallelism=8")
    import_model(exported, tmp_path / "second", config, specs, console=console)
    export_model(tmp_path / "second", again, console=console)
    for path in exported.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_report_says_how_weights_are_stored(tmp_path: Path) -> None:
    make_quantized(tmp_path / "a", GPT_OSS)
    make_quantized(tmp_path / "b", QWEN)
    found = detect(tmp_path / "a")
    assert found.lines[-1].endswith("bfloat16; 4 of them stored as mxfp4, a scale for each 1 x 32")
    assert found.dtype == found.settings["dtype"] == "bfloat16"
    assert "56 of them stored as fp8, a scale for each 16 x 16" in detect(tmp_path / "b").lines[-1]


def published(name: str) -> tuple[dict[str, Any], dict[str, list[int]], dict[str, str]]:
    """Return a published model as its authors store it: config.json, shapes and dtypes."""
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    mxfp4 = name == "gpt-oss-20b"
    for tensor, shape in tensors(name).items():
        if mxfp4 and tensor.endswith("_proj") and ".experts." in tensor:
            experts, ins, outs = shape
            shapes[f"{tensor}_blocks"] = [experts, outs, ins // 32, 16]
            shapes[f"{tensor}_scales"] = [experts, outs, ins // 32]
            dtypes |= dict.fromkeys((f"{tensor}_blocks", f"{tensor}_scales"), "U8")
            continue
        shapes[tensor] = shape
        if not mxfp4 and is_fp8(tensor):
            shapes[f"{tensor}_scale_inv"] = [-(-n // 128) for n in shape]
            dtypes |= {tensor: "F8_E4M3", f"{tensor}_scale_inv": "F32"}
        elif tensor.endswith("correction_bias"):
            dtypes[tensor] = "F32"
    said = MXFP4 if mxfp4 else FP8 | {"weight_block_size": [128, 128]}
    return CONFIGS[name] | {"quantization_config": said}, shapes, dtypes


@pytest.mark.parametrize(
    ("name", "elements", "files", "stored"),
    [("DeepSeek-V3", 671_026_419_200, 163, 90_000), ("gpt-oss-20b", 20_914_757_184, 3, 400)],
)
def test_what_is_published(
    name: str, elements: int, files: int, stored: int, tmp_path: Path
) -> None:
    config, shapes, dtypes = published(name)
    assert len(shapes) > stored
    directory = write_model(tmp_path / "model", config, shapes, dtypes=dtypes, files=files)
    detect(directory)  # the first reads the families' files too
    found, calls = counted(lambda: detect(directory))
    assert calls < 500_000 + 150 * len(shapes)
    assert f"{elements:,}" in found.lines[-1]
    plain = detect(write_model(tmp_path / "plain", CONFIGS[name], tensors(name)))
    assert found.settings == plain.settings
    assert found.plan.pieces == plain.plan.pieces
    assert set(found.plan.carried) == set(plain.plan.carried)


def tiny(change: Callable[[dict[str, Any], Tensors], None], tmp_path: Path) -> Path:
    """Make a quantized Qwen with a change."""
    make_quantized(tmp_path / "model", QWEN, files=1)
    file = tmp_path / "model" / "model-00001-of-00001.safetensors"
    stored = dict(read_file(file))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    change(config, stored)
    file.unlink()
    write(tmp_path / "model", config, stored, 1)
    return tmp_path / "model"


QUERY = "model.layers.0.self_attn.q_proj.weight"
SCALE = f"{QUERY}_scale_inv"


def says(value: Any) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda config, _: config.update(quantization_config=value)


def plain_only(_config: dict[str, Any], stored: Tensors) -> None:
    for name in [*stored]:
        if name.endswith("_scale_inv"):
            del stored[name]
        else:
            stored[name] = stored[name].astype(BF16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _, t: t.pop(SCALE), ["q_proj.weight: its scales", "are missing", "[4, 3]"]),
        (lambda _, t: t.update({SCALE: t[SCALE][:3]}), ["F32 of shape [3, 3]", "[4, 3]"]),
        (lambda _, t: t.update({SCALE: t[SCALE].astype(np.int64)}), ["are I64 of shape [4, 3]"]),
        (lambda _, t: t.pop(QUERY), ["q_proj.weight_scale_inv (F32) belongs to quantized"]),
        (
            lambda config, _: config.pop("quantization_config"),
            ["_proj.weight_scale_inv (F32) belongs to", "fix: a config.json with the"],
        ),
        (plain_only, ["quantization_config with fp8, but no tensor is stored so"]),
        (says("odd"), ["weights are stored as odd"]),
        (says({"quant_method": "gptq", "bits": 4}), ["weights are stored as gptq", "bfloat16"]),
        (says({"quant_method": "fp8", "fmt": "e5m2"}), ["stored as fp8, fmt=e5m2"]),
        (says({"quant_method": "fp8", "weight_block_size": None}), ["weight_block_size=null"]),
        (says({"quant_method": "fp8", "weight_block_size": [0, 1]}), ["weight_block_size=[0, 1]"]),
        (says(FP8 | {"weight_block_size": [16, 8]}), ["F32 of shape [3, 1], not", "[3, 2]"]),
        (says(MXFP4), ["with mxfp4, but no tensor is stored so"]),
    ],
)
def test_what_does_not_belong_together(change: Any, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        detect(tiny(change, tmp_path))
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert "fix: " in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"w_blocks": ("U8", [2, 4, 2, 8]), "w_scales": ("U8", [2, 4, 2])}, ["[2, 4, 2, 8]"]),
        ({"w_blocks": ("BF16", [2, 4, 2, 16]), "w_scales": ("U8", [2, 4, 2])}, ["is BF16 of"]),
        ({"w_blocks": ("U8", [2, 4, 2, 16])}, ["w_scales are missing, not U8 of shape [2, 4, 2]"]),
        (
            {"w": ("BF16", [1]), "w_blocks": ("U8", [1, 1, 1, 16]), "w_scales": ("U8", [1, 1, 1])},
            ["w and w_blocks are one thing"],
        ),
    ],
)
def test_blocks_that_are_none(
    stored: dict[str, tuple[str, list[int]]], words: list[str], tmp_path: Path
) -> None:
    headers = {
        name: TensorHeader(tmp_path / "f", dtype, tuple(shape), 0, 0)
        for name, (dtype, shape) in stored.items()
    }
    with pytest.raises(UserError) as caught:
        with_scales(headers, read_scheme(MXFP4, tmp_path), tmp_path)
    for word in words:
        assert word in str(caught.value)
