"""Write quantized model directories, and decode their bits one by one in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.autoep.checkpoints import BF16, Tensors, write_file
from tests.autoep.published import plain

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 40,
    "intermediate_size": 56,
    "kv_lora_rank": 16,
    "max_position_embeddings": 64,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "bfloat16",
    "v_head_dim": 12,
    "vocab_size": 96,
}
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 96,
}
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 64,
    "model_type": "gpt_oss",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 8,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 96,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
MXFP4 = {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"}


def e4m3(byte: int) -> float:
    """Decode 1 sign, 4 exponent (bias 7), 3 mantissa bits; exponent 15 with mantissa 7 is NaN."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e2m1(half: int) -> float:
    """Decode 1 sign, 2 exponent (bias 1) and 1 mantissa bit."""
    sign, exponent, mantissa = -1.0 if half & 8 else 1.0, half >> 1 & 3, half & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def decode_fp8(bits: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Decode fp8 to float64, element by element."""
    found = np.empty(bits.shape)
    for index in np.ndindex(bits.shape):
        *outer, row, column = index
        scale = scales[(*outer, row // block[0], column // block[1])]
        found[index] = e4m3(int(bits.view(np.uint8)[index])) * float(scale)
    return found


def decode_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Decode mxfp4 to [E, I, O] in float64, element by element."""
    experts, rows, groups, _ = blocks.shape
    found = np.empty((experts, groups * 32, rows))
    for e, column, row in np.ndindex(found.shape):
        group, at = divmod(column, 32)
        byte = int(blocks[e, row, group, at // 2])
        half = byte >> 4 if at % 2 else byte & 15
        found[e, column, row] = e2m1(half) * 2.0 ** (int(scales[e, row, group]) - 127)
    return found


def is_fp8(name: str) -> bool:
    """Tell whether DeepSeek-V3 stores a tensor in fp8: matrices of attention, MLPs and experts."""
    return name.endswith(("_proj.weight", "_mqa.weight")) and ".eh_proj." not in name


def make_quantized(
    directory: Path,
    config: Mapping[str, Any],
    *,
    block: tuple[int, int] = (16, 16),
    powers_of_two: bool = False,
    files: int = 2,
    seed: int = 0,
) -> Tensors:
    """Write a directory with random bits: mxfp4 for gpt-oss, fp8 for the others.

    Args:
        directory: the directory to make.
        config: the model's config.json.
        block: the block size of fp8.
        powers_of_two: whether fp8's scales are, so that every product is exact in bfloat16.
        files: how many files hold the tensors; scales are often not in the file of their bits.
        seed: the seed of the values.

    Returns:
        The dequantized tensors, in bfloat16.
    """
    rng = np.random.default_rng(seed)
    mxfp4 = config["model_type"] == "gpt_oss"
    stored: Tensors = {}
    found: Tensors = {}
    for name, shape in plain(dict(config)):
        if mxfp4 and name.endswith("_proj") and ".experts." in name:
            experts, ins, outs = shape
            blocks = rng.integers(0, 256, (experts, outs, ins // 32, 16), np.uint8)
            scales = rng.integers(121, 125, blocks.shape[:-1]).astype(np.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            found[name] = decode_mxfp4(blocks, scales).astype(BF16)
        elif not mxfp4 and is_fp8(name):
            bits = (rng.standard_normal(shape) * 8).astype(E4M3)
            grid = tuple(-(-n // each) for n, each in zip(shape, block, strict=True))
            scales = rng.uniform(0.01, 0.03, grid).astype(np.float32)
            if powers_of_two:
                scales = np.exp2(np.round(np.log2(scales)))
            stored |= {name: bits, f"{name}_scale_inv": scales}
            found[name] = decode_fp8(bits, scales, block).astype(BF16)
        elif "norm" in name:
            stored[name] = found[name] = rng.uniform(0.5, 1.5, shape).astype(BF16)
        else:
            dtype = np.float32 if name.endswith("correction_bias") else BF16
            values = rng.standard_normal(shape) / math.sqrt(shape[-1])
            stored[name] = found[name] = values.astype(dtype)
    said = MXFP4 if mxfp4 else FP8 | {"weight_block_size": list(block)}
    directory.mkdir(parents=True)
    write(directory, {**config, "quantization_config": said}, stored, files)
    return found


def make_plain(directory: Path, config: Mapping[str, Any], *, seed: int = 0) -> Path:
    """Write a directory with random bfloat16 weights, in two files; return it.

    The largest magnitude of each matrix is 7, so that its scale in fp8 is a power of two.
    """
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name, shape in plain(dict(config)):
        values = np.clip(rng.standard_normal(shape), -6, 6)
        values.reshape(-1)[0] = 7
        values = values * (0.01 if len(shape) == 1 else 1 / 32) + ("norm" in name)
        tensors[name] = values.astype(BF16)
    directory.mkdir()
    write(directory, config, tensors, 2)
    return directory


def write(directory: Path, config: Mapping[str, Any], tensors: Tensors, files: int) -> None:
    """Write the configuration, the index and the tensors."""
    names = [f"model-{number + 1:05}-of-{files:05}.safetensors" for number in range(files)]
    places = {name: names[at % files] for at, name in enumerate(sorted(tensors))}
    for file in names:
        write_file(directory / file, {n: tensors[n] for n, at in places.items() if at == file})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
