"""Check projections that are stored in few bits against decoders that go element by element."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moe_shard.autoep.dequantize import read
from moe_shard.autoep.detect import detect
from moe_shard.autoep.headers import read_headers
from moe_shard.autoep.quantize import encode_fp8, encode_mxfp4, quantize_directory
from moe_shard.autoep.tensors import writable
from moe_shard.checkpoints.imported import export_model, import_model
from moe_shard.errors import UserError
from tests.autoep.checkpoints import read_file
from tests.autoep.quantize import (
    GPT_OSS,
    QWEN,
    decode_fp8,
    decode_mxfp4,
    e2m1,
    e4m3,
    make_plain,
)
from tests.autoep.test_quantized import specs_of

E4M3 = np.array([e4m3(byte) for byte in range(256) if not math.isnan(e4m3(byte))])
E2M1 = np.array([e2m1(half) for half in range(16)])


def test_fp8_is_the_nearest_number_of_each_block() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((130, 150)).astype(np.float32)
    matrix[:128, :128] *= 1e-3
    matrix[128:, 128:] = 0
    bits, scales, decoded = encode_fp8(matrix)
    assert scales.shape == (2, 2)
    assert scales[1, 1] == 1
    assert scales[0, 0] == np.float32(np.abs(matrix[:128, :128]).max()) / np.float32(448)
    np.testing.assert_array_equal(decoded, decode_fp8(bits, scales, (128, 128)).astype(np.float32))
    wide = scales.repeat(128, 0).repeat(128, 1)[:130, :150].astype(np.float64)
    exact = matrix / wide
    nearest = np.abs(exact[..., None] - E4M3).min(axis=-1)
    # The quotient is rounded to float32 before it is rounded to e4m3.
    np.testing.assert_allclose(np.abs(decoded / wide - exact), nearest, atol=1e-4)


def test_mxfp4_is_the_nearest_number_by_the_exponent_of_the_standard() -> None:
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((64, 5)) * np.exp2(rng.integers(-20, 20, (64, 5)))).astype("f4")
    matrix[:32, 0] = 0
    bits, exponents, decoded = encode_mxfp4(matrix)
    assert (bits.shape, exponents.shape) == ((5, 2, 16), (5, 2))
    np.testing.assert_array_equal(decoded, decode_mxfp4(bits[None], exponents[None])[0])
    for column, group in np.ndindex(5, 2):
        numbers = matrix[32 * group : 32 * group + 32, column].astype(np.float64)
        most = np.abs(numbers).max()
        exponent = math.floor(math.log2(most)) - 2 if most else -127
        assert exponents[column, group] == exponent + 127
        clipped = np.clip(numbers * 2.0**-exponent, -6, 6)
        nearest = np.abs(clipped[:, None] - E2M1).min(axis=1)
        found = decoded[32 * group : 32 * group + 32, column] * 2.0**-exponent
        np.testing.assert_array_equal(np.abs(found - clipped), nearest)


def test_what_was_mxfp4_is_the_same_number_again() -> None:
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (1, 7, 3, 16)).astype(np.uint8)
    exponents = rng.integers(20, 230, (1, 7, 3)).astype(np.uint8)
    numbers = decode_mxfp4(blocks, exponents)[0].astype(np.float32)
    np.testing.assert_array_equal(encode_mxfp4(numbers)[2], numbers)


@pytest.mark.parametrize(("method", "config"), [("fp8", QWEN), ("mxfp4", GPT_OSS)])
def test_a_directory_in_few_bits(method: Any, config: dict[str, Any], tmp_path: Path) -> None:
    source, few_bits = (make_plain(tmp_path / name, config) for name in ("plain", "few"))
    said = quantize_directory(few_bits, detect(source).plan, method)
    few = detect(few_bits)
    assert few.settings == detect(source).settings
    before, after = read_headers(source), few.headers
    assert before.keys() == after.keys()
    stored = {n for n, entry in after.items() if entry != read_headers(few_bits).get(n)}
    assert stored == {n for n in before if n.endswith("_proj" + ".weight" * (method == "fp8"))}
    for name, entry in after.items():
        old, new = (read(each).astype(np.float64) for each in (before[name], entry))
        if name not in stored:
            np.testing.assert_array_equal(new, old)
            continue
        # Half the distance of neighbours: 1/16 of a number in e4m3, 1/4 in e2m1, where those
        # above 6 lose a quarter too.
        most, off = np.abs(old).max(), np.abs(new - old)
        assert 0 < off.max() <= most / (14 if method == "fp8" else 3), name
    assert said.startswith(f"{len(stored)} of {len(before)} tensors stored as {method}, a scale")
    index = json.loads((few_bits / "model.safetensors.index.json").read_text())
    files = {path.name: read_file(path) for path in few_bits.glob("*.safetensors")}
    assert index["weight_map"] == {n: f for f, tensors in files.items() for n in tensors}
    size = sum(t.nbytes for tensors in files.values() for t in tensors.values())
    assert index["metadata"]["total_size"] == size < 0.75 * sum(e.nbytes for e in before.values())
    kept = json.loads((few_bits / "config.json").read_text())["quantization_config"]
    left_out = kept["modules_to_not_convert"]
    assert "lm_head" in left_out
    assert any(name.endswith("q_proj") for name in left_out) == (method == "mxfp4")
    assert sorted(path.name for path in few_bits.iterdir()) == sorted(
        path.name for path in source.iterdir()
    )


def test_what_was_fp8_has_the_same_bits_again(tmp_path: Path) -> None:
    folder = make_plain(tmp_path / "model", QWEN)
    quantize_directory(folder, detect(folder).plan, "fp8")
    imported, again = tmp_path / "imported", tmp_path / "again"
    console = Console(width=200, file=io.StringIO())
    settings, specs = specs_of(folder, "ici_expert_parallelism=8")
    import_model(folder, imported, settings, specs, console=console)
    export_model(imported, again, console=console, quantize="fp8")
    for path in folder.glob("*.safetensors"):
        found = read_file(again / path.name)
        for name, tensor in read_file(path).items():
            if name.endswith("_scale_inv"):
                # Its numbers were rounded to bfloat16 in between.
                np.testing.assert_allclose(found[name], tensor, rtol=2**-8)
            else:
                assert tensor.tobytes() == found[name].tobytes(), name


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    folder = make_plain(tmp_path / "model", QWEN)
    plan = detect(folder).plan
    with pytest.raises(UserError, match=r"mxfp4 is for stacked experts[^\n]*\nfix: fp8"):
        quantize_directory(folder, plan, "mxfp4")
    name = "model.layers.0.self_attn.q_proj.weight"
    place = writable(read_headers(folder)[name])
    place[3, 5] = np.nan
    with pytest.raises(UserError, match=f"{name}: a number is not finite"):
        quantize_directory(folder, plan, "fp8")
