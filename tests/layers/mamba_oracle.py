"""Compute Mamba-2 and a short convolution in NumPy, one token after the other.

Written from arXiv 2405.21060 and 2511.23404.

B  sequences      S  tokens      G  groups      R  heads of a group
M  model dim      P  elements of a value        D  elements of a key
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.layers.delta_oracle import conv

Arrays = Mapping[str, Any]


def mamba(x: np.ndarray, p: Arrays, segment_ids: np.ndarray, keys: Arrays) -> np.ndarray:
    """Return the layer's output [B S M] for [B S M].

    Args:
        x: normalised activations.
        p: the parameters, by name; biases may be missing.
        segment_ids: documents.
        keys: the configuration, flat.
    """

    def project(name: str) -> np.ndarray:
        return np.tensordot(x, p[name], 1) + p.get(f"{name}_bias", 0)

    value, key, query = (
        _silu(conv(project(n), p[f"{n}_conv"], segment_ids) + p.get(f"{n}_conv_bias", 0))
        for n in ("value", "key", "query")
    )
    step = np.logaddexp(0, project("step") + p["step_shift"])
    most = keys["mamba_step_max"]
    step = np.clip(step, keys["mamba_step_min"], np.inf if most == -1 else most)
    y = np.zeros_like(value)
    rate = np.exp(p["decay_log"])
    for row, documents in enumerate(segment_ids):
        for group in range(value.shape[2]):
            for head in range(value.shape[3]):
                state = np.zeros((value.shape[4], key.shape[3]), x.dtype)
                for t in range(x.shape[1]):
                    if t and documents[t] != documents[t - 1]:
                        state = np.zeros_like(state)
                    at = row, t, group, head
                    state = np.exp(-rate[group, head] * step[at]) * state
                    state = state + step[at] * np.outer(value[at], key[row, t, group])
                    y[at] = state @ query[row, t, group] + p["skip"][group, head] * value[at]
    y = y * _silu(project("gate"))
    mean_square = np.mean(y**2, axis=(-2, -1), keepdims=True)
    y = y / np.sqrt(mean_square + keys["normalization_layer_epsilon"]) * p["norm_scale"]
    return np.tensordot(y, p["out"], 3) + p.get("out_bias", 0)


def short_convolution(x: np.ndarray, p: Arrays, segment_ids: np.ndarray) -> np.ndarray:
    """Return the layer's output, likewise."""
    into, out_of, value = (
        x @ p[name] + p.get(f"{name}_bias", 0) for name in ("input_gate", "output_gate", "value")
    )
    y = conv(into * value, p["taps"], segment_ids) + p.get("taps_bias", 0)
    return (out_of * y) @ p["out"] + p.get("out_bias", 0)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))
