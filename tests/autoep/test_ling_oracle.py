"""Compare a small Ling with its published code's arithmetic in NumPy: no library has its class.

Everything is in float64, and gradients are central differences of the oracle's loss.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.autoep.test_newer_families import ling
from tests.parity import weights
from tests.parity.families import LENGTH, ROWS, VOCAB
from tests.parity.package import evaluate, gradients, open_model

Arrays = dict[str, np.ndarray]
HEADS, GROUPS, SIZE, K = 4, 2, 8, 2
STEP = 1e-6


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def turned(x: np.ndarray) -> np.ndarray:
    """Turn heads [S N D] by their positions, first half with second half."""
    angles = np.arange(len(x))[:, None] * 10_000.0 ** (-np.arange(0, SIZE, 2) / SIZE)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., : SIZE // 2], x[..., SIZE // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attended(x: np.ndarray, t: Arrays, at: str) -> np.ndarray:
    fused = x @ t[f"{at}query_key_value.weight"].T + t[f"{at}query_key_value.bias"]
    heads = fused.reshape(len(x), HEADS + 2 * GROUPS, SIZE)
    query, key = turned(heads[:, :HEADS]), turned(heads[:, HEADS : HEADS + GROUPS])
    value = heads[:, HEADS + GROUPS :]
    out = []
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        scores = query[:, head] @ key[:, group].T / np.sqrt(SIZE)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        exp = np.exp(scores - scores.max(-1, keepdims=True))
        out.append(exp / exp.sum(-1, keepdims=True) @ value[:, group])
    return np.concatenate(out, axis=-1) @ t[f"{at}dense.weight"].T


def mlp(x: np.ndarray, t: Arrays, at: str) -> np.ndarray:
    gate, up = x @ t[f"{at}gate_proj.weight"].T, x @ t[f"{at}up_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ t[f"{at}down_proj.weight"].T


def routed(x: np.ndarray, t: Arrays, at: str) -> np.ndarray:
    logits = x @ t[f"{at}gate.weight"].T
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = mlp(x, t, f"{at}shared_experts.")
    for token, each in enumerate(probs):
        chosen = np.argsort(-each)[:K]
        for expert in chosen:
            share = each[expert] / each[chosen].sum()
            out[token] += share * mlp(x[token], t, f"{at}experts.{expert}.")
    return out


def logits_of(t: Arrays, tokens: np.ndarray) -> np.ndarray:
    """Compute the logits [S V] of one sequence."""
    x = t["model.word_embeddings.weight"][tokens]
    for layer in range(2):
        at = f"model.layers.{layer}."
        x = x + attended(normed(x, t[f"{at}input_layernorm.weight"]), t, f"{at}attention.")
        x = x + routed(normed(x, t[f"{at}post_attention_layernorm.weight"]), t, f"{at}mlp.")
    return normed(x, t["model.norm.weight"]) @ t["lm_head.weight"].T


def loss_of(t: Arrays, inputs: np.ndarray, targets: np.ndarray) -> float:
    logits = np.stack([logits_of(t, row) for row in inputs])
    given = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return float(np.mean(np.log(np.exp(logits).sum(-1)) - given))


def kind_of(name: str) -> str:
    return re.sub(r"\d+", "N", name)


@pytest.mark.recorded
def test_logits_and_gradients(tmp_path: Path) -> None:
    config, shapes = ling(vocab_size=VOCAB)
    for name in ("model.word_embeddings.weight", "lm_head.weight"):
        shapes[name] = [VOCAB, 16]
    where = tmp_path / "ling"
    where.mkdir()
    (where / "config.json").write_text(json.dumps(config))
    drawn = {name: weights.tensor(name, shape, 3) for name, shape in shapes.items()}
    weights.write(where / "model.safetensors", drawn)
    wide: Any = {name: each.astype(np.float64) for name, each in drawn.items()}
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    opened = open_model(where, 4)
    found = evaluate(opened, inputs, targets)
    expected = np.stack([logits_of(wide, row) for row in inputs])
    np.testing.assert_allclose(found.logits, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.ce_loss, loss_of(wide, inputs, targets), rtol=1e-5)

    shutil.copytree(where, tmp_path / "gradients")
    _, grads = gradients(opened, inputs, targets, tmp_path / "gradients")
    assert grads.keys() == drawn.keys()
    for kind in dict.fromkeys(map(kind_of, drawn)):
        # Along one direction of all tensors of a kind.
        way = {
            n: rng.standard_normal(each.shape) for n, each in drawn.items() if kind_of(n) == kind
        }
        ahead, behind = (
            loss_of(wide | {n: wide[n] + step * each for n, each in way.items()}, inputs, targets)
            for step in (STEP, -STEP)
        )
        found_slope = sum(np.sum(grads[n] * each) for n, each in way.items())
        size = np.sqrt(sum(np.sum(grads[n] ** 2) for n in way))
        assert abs(found_slope - (ahead - behind) / (2 * STEP)) <= 1e-4 * size, kind
