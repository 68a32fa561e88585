"""Find the parameters of gated delta nets and gated attention in tensors that hold several."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_shard.autoep.detect import detect
from moe_shard.errors import UserError
from tests.autoep.directory import write_model

M, J, R, D, E, K, N, H = 24, 2, 3, 4, 5, 3, 4, 6
"""Model dim, key heads, values each, elements of key and value, taps; query heads, their size."""
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_next", "vocab_size": 32, "hidden_size": M, "num_hidden_layers": 2,
    "full_attention_interval": 2, "num_attention_heads": N, "num_key_value_heads": 2,
    "head_dim": H, "partial_rotary_factor": 1.0, "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1,
    "linear_num_key_heads": J, "linear_num_value_heads": J * R, "linear_key_head_dim": D,
    "linear_value_head_dim": E, "linear_conv_kernel_dim": K,
}  # fmt: skip
CHANNELS = J * (2 * D + R * E)
BY_HEAD = {"in_proj_qkvz": [J * (2 * D + 2 * R * E), M], "in_proj_ba": [2 * J * R, M]}
APART = {
    "in_proj_qkv": [CHANNELS, M], "in_proj_z": [J * R * E, M],
    "in_proj_b": [J * R, M], "in_proj_a": [J * R, M],
}  # fmt: skip


def shapes(projections: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the tensors of a model with one delta net and one layer of attention."""
    found = {"model.embed_tokens.weight": [32, M], "lm_head.weight": [32, M]}
    found["model.norm.weight"] = [M]
    for layer in (0, 1):
        at = f"model.layers.{layer}."
        found |= {f"{at}{name}.weight": [M] for name in ("input_layernorm",)}
        found[f"{at}post_attention_layernorm.weight"] = [M]
        found[f"{at}mlp.gate.weight"], found[f"{at}mlp.shared_expert_gate.weight"] = [2, M], [1, M]
        for mlp in ("experts.0", "experts.1", "shared_expert"):
            found |= {f"{at}mlp.{mlp}.{name}_proj.weight": [8, M] for name in ("gate", "up")}
            found[f"{at}mlp.{mlp}.down_proj.weight"] = [M, 8]
    at = "model.layers.0.linear_attn."
    found |= {f"{at}{name}.weight": shape for name, shape in projections.items()}
    found |= {f"{at}A_log": [J * R], f"{at}dt_bias": [J * R], f"{at}norm.weight": [E]}
    found |= {f"{at}conv1d.weight": [CHANNELS, 1, K], f"{at}out_proj.weight": [M, J * R * E]}
    at = "model.layers.1.self_attn."
    found |= {f"{at}q_proj.weight": [2 * N * H, M], f"{at}o_proj.weight": [M, N * H]}
    found |= {f"{at}{name}_proj.weight": [2 * H, M] for name in "kv"}
    return found | {f"{at}{name}_norm.weight": [H] for name in "qk"}


def parameters(directory: Path, saved: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Return what each parameter takes of tensors whose elements are numbered."""
    found = {}
    for piece in detect(directory).plan.pieces:
        shape = saved[piece.tensor]
        numbered = np.arange(math.prod(shape)).reshape(shape)
        found[".".join(piece.param)] = piece.layout.view(numbered)
    return found


@pytest.mark.parametrize("projections", [BY_HEAD, APART], ids=["by-head", "apart"])
def test_every_parameter_has_its_rows(tmp_path: Path, projections: dict[str, list[int]]) -> None:
    saved = shapes(projections)
    found = parameters(write_model(tmp_path / "model", CONFIG, saved), saved)
    rows = np.arange(CHANNELS)  # queries, keys, values
    keys, of_value = J * D, (J, R, E)
    if projections is APART:
        parts = {
            "query": rows[:keys].reshape(J, D),
            "key": rows[keys : 2 * keys].reshape(J, D),
            "value": rows[2 * keys :].reshape(of_value),
            "gate": np.arange(J * R * E).reshape(of_value),
            "rate": np.arange(J * R).reshape(J, R),
            "decay": np.arange(J * R).reshape(J, R),
        }
    else:
        by_head = np.arange(J * (2 * D + 2 * R * E)).reshape(J, -1)
        two = np.arange(2 * J * R).reshape(J, 2, R)
        parts = {
            "query": by_head[:, :D],
            "key": by_head[:, D : 2 * D],
            "value": by_head[:, 2 * D : 2 * D + R * E].reshape(of_value),
            "gate": by_head[:, 2 * D + R * E :].reshape(of_value),
            "rate": two[:, 0],
            "decay": two[:, 1],
        }
    for name, row in parts.items():
        got = found[f"layers_0.delta.{name}"]
        np.testing.assert_array_equal(got, np.moveaxis(row[..., None] * M + np.arange(M), -1, 0))
    conv = {"query": rows[:keys], "key": rows[keys : 2 * keys], "value": rows[2 * keys :]}
    for name, row in conv.items():
        got = found[f"layers_0.delta.{name}_conv"]
        np.testing.assert_array_equal(got.reshape(K, -1), (row[:, None] * K + np.arange(K)).T)
    np.testing.assert_array_equal(found["layers_0.delta.decay_log"].ravel(), np.arange(J * R))
    both = np.arange(2 * N * H).reshape(N, 2, H)
    for at, name in enumerate(("query", "gate")):
        expected = np.moveaxis(both[:, at, :, None] * M + np.arange(M), -1, 0)
        np.testing.assert_array_equal(found[f"layers_1.attention.{name}"], expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"linear_num_key_heads": 3}, "linear_num_key_heads=3"),
        ({"layer_types": ["linear_attention", "mamba"]}, "layer_types"),
        ({"layer_types": ["full_attention"] * 2}, "attention"),
    ],
)
def test_another_config_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    directory = write_model(tmp_path / "model", CONFIG | changes, shapes(BY_HEAD))
    with pytest.raises(UserError) as caught:
        detect(directory)
    assert words in str(caught.value)
    assert "\nfix: " in str(caught.value)


def test_layers_by_name_are_those_of_the_interval(tmp_path: Path) -> None:
    named = CONFIG | {"layer_types": ["linear_attention", "full_attention"]}
    found = [
        detect(write_model(tmp_path / str(at), config, shapes(BY_HEAD))).settings["mixer_pattern"]
        for at, config in enumerate((CONFIG, named))
    ]
    assert found == [["gated_delta_net", "attention"]] * 2
