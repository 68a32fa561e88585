"""Compare fp8 and mxfp4 models, published and written, with transformers' reading of them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_shard.autoep.detect import detect
from moe_shard.autoep.quantize import quantize_directory
from tests.autoep.quantize import DEEPSEEK, GPT_OSS, QWEN, make_plain, make_quantized
from tests.parity.families import LENGTH, ROWS, VOCAB
from tests.parity.package import evaluate, open_model

pytestmark = pytest.mark.parity

# Tensors after the last layer do not belong to the model, and transformers reports them.
MODELS = {
    "deepseek_v3": DEEPSEEK | {"num_nextn_predict_layers": 0},
    "gpt_oss": GPT_OSS,
    "qwen3_moe": QWEN,
}


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, tmp_path: Path) -> None:
    # transformers divides a matrix evenly into blocks, and rounds to bfloat16 in between.
    make_quantized(tmp_path / "model", MODELS[name], block=(8, 8), powers_of_two=True)
    rng = np.random.default_rng(1)
    inputs = rng.integers(0, VOCAB, (ROWS, LENGTH))
    opened = open_model(tmp_path / "model", 8)
    answer = evaluate(opened, inputs, np.roll(inputs, -1, axis=1))
    expected = logits(tmp_path / "model", inputs)
    np.testing.assert_allclose(answer.logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "method"), [("qwen3_moe", "fp8"), ("gpt_oss", "mxfp4")])
def test_transformers_reads_what_is_written(name: str, method: Any, tmp_path: Path) -> None:
    folder = make_plain(tmp_path / "model", MODELS[name])
    quantize_directory(folder, detect(folder).plan, method)
    rng = np.random.default_rng(1)
    inputs = rng.integers(0, VOCAB, (ROWS, LENGTH))
    answer = evaluate(open_model(folder, 8), inputs, np.roll(inputs, -1, axis=1))
    np.testing.assert_allclose(answer.logits, logits(folder, inputs), rtol=1e-4, atol=1e-4)


def logits(directory: Path, inputs: np.ndarray) -> np.ndarray:
    """Compute the logits with transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    importlib.import_module("tests.parity.reference")  # one thread, no progress bars

    kind: Any = Mxfp4Config if "gpt_oss" in (directory / "config.json").read_text() else None
    model, report = AutoModelForCausalLM.from_pretrained(
        directory,
        quantization_config=(kind or FineGrainedFP8Config)(dequantize=True),
        attn_implementation="eager",
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    assert not any(report.values()), report
    with torch.no_grad():
        found: np.ndarray = model.float().eval()(torch.tensor(inputs)).logits.numpy()
    return found
