"""Compute a gated delta net in NumPy, one token after the other, in the dtype of its inputs.

B  sequences      S  tokens      J  key heads      R  value heads of each      K  taps
M  model dim      D  elements of a key      E  elements of a value
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def delta_rule(
    inputs: Sequence[np.ndarray], begins: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return what each token reads [B S J R E], and the last state [B J R D E].

    Args:
        inputs: query and key [B S J D], value [B S J R E], logarithm of the decay and rate
            [B S J R].
        begins: 1 for the first token of a document [B S].
        state: the state before the first token.
    """
    query, key, value, log_decay, rate = inputs
    found = []
    for t in range(query.shape[1]):
        kept = np.exp(log_decay[:, t]) * (1 - begins[:, t, None, None])
        state = state * kept[..., None, None]
        there = np.einsum("bjd,bjrde->bjre", key[:, t], state)
        change = rate[:, t, ..., None] * (value[:, t] - there)
        state = state + np.einsum("bjd,bjre->bjrde", key[:, t], change)
        found.append(np.einsum("bjd,bjrde->bjre", query[:, t], state))
    return np.stack(found, axis=1), state


def conv(x: np.ndarray, kernel: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """Return the causal convolution of [B S C...] by [K C...] within documents."""
    y, taps = np.zeros_like(x), len(kernel)
    for row, documents in enumerate(segment_ids):
        for t in range(x.shape[1]):
            for back in range(min(taps, t + 1)):
                if documents[t - back] == documents[t]:
                    y[row, t] += kernel[taps - 1 - back] * x[row, t - back]
    return y


def delta_net(
    x: np.ndarray, params: Mapping[str, Any], segment_ids: np.ndarray, keys: Mapping[str, Any]
) -> np.ndarray:
    """Return the layer's output [B S M] for [B S M].

    Args:
        x: normalised activations.
        params: the parameters, by name.
        segment_ids: documents.
        keys: the configuration, flat.
    """
    query, key, value = (
        _silu(conv(np.tensordot(x, params[name], 1), params[f"{name}_conv"], segment_ids))
        for name in ("query", "key", "value")
    )
    if keys["use_qk_norm_in_gdn"]:
        query, key = (
            each / np.sqrt(np.sum(each**2, axis=-1, keepdims=True) + 1e-6) for each in (query, key)
        )
    steps = np.tensordot(x, params["decay"], 1) + params["decay_bias"]
    begins = np.ones_like(segment_ids)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    batch, _, heads, of_key = key.shape
    decay = -np.exp(params["decay_log"]) * np.logaddexp(0, steps)
    rate = 1 / (1 + np.exp(-np.tensordot(x, params["rate"], 1)))
    empty = np.zeros((batch, heads, value.shape[3], of_key, value.shape[4]))
    y, _ = delta_rule([query / np.sqrt(of_key), key, value, decay, rate], begins, empty)
    mean_square = np.mean(y**2, axis=-1, keepdims=True)
    y = y / np.sqrt(mean_square + keys["normalization_layer_epsilon"]) * params["norm"]["scale"]
    return np.tensordot(y * _silu(np.tensordot(x, params["gate"], 1)), params["out"], 3)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))
