"""Compute the grouped product and its gradients by a loop over groups, in float64 NumPy."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np


class Answer(NamedTuple):
    """Hold the expected results. Rows past the last group are zero, and must not be compared."""

    y: np.ndarray
    dx: np.ndarray
    dw: np.ndarray
    rows: int


def grouped(x: Any, w: Any, sizes: Any, dy: Any) -> Answer:
    x, w, dy = (np.asarray(each, np.float64) for each in (x, w, dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for group, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start + int(size))
        y[rows] = x[rows] @ w[group]
        dx[rows] = dy[rows] @ w[group].T
        dw[group] = x[rows].T @ dy[rows]
        start = rows.stop
    return Answer(y, dx, dw, start)


class MLPAnswer(NamedTuple):
    """Hold the expected output of gated MLPs, and its gradients."""

    y: np.ndarray
    dx: np.ndarray
    by_weights: list[np.ndarray]
    by_biases: list[np.ndarray]
    rows: int


def mlp(
    x: Any, weights: Any, biases: Any, sizes: Any, dy: Any, *, act: str, limit: float, offset: float
) -> MLPAnswer:
    x, dy, w_gate, w_up, w_down = (np.asarray(each, np.float64) for each in (x, dy, *weights))
    biases = [np.asarray(each, np.float64) for each in biases]
    sizes = np.asarray(sizes)
    none = np.zeros((len(x), w_gate.shape[2]))
    gate, up = (grouped(x, w, sizes, none).y for w in (w_gate, w_up))
    rows = int(np.sum(sizes))
    for y, bias in zip((gate, up), biases, strict=False):
        y[:rows] += np.repeat(bias, sizes, axis=0)
    inside_gate, inside_up = np.ones_like(gate), np.ones_like(up)
    if limit > 0:
        inside_gate, inside_up = 1.0 * (gate < limit), 1.0 * (np.abs(up) < limit)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    up = up + offset
    value, slope = ACTIVATIONS[act](gate)
    of_down = grouped(value * up, w_down, sizes, dy)
    by_gate, by_up = of_down.dx * up * slope * inside_gate, of_down.dx * value * inside_up
    of_gate, of_up = grouped(x, w_gate, sizes, by_gate), grouped(x, w_up, sizes, by_up)
    ends = np.cumsum(sizes)
    by_biases = [
        np.stack([by[end - n : end].sum(axis=0) for n, end in zip(sizes, ends, strict=True)])
        for by in (by_gate, by_up)
    ]
    by_weights = [of_gate.dw, of_up.dw, of_down.dw]
    dx = of_gate.dx + of_up.dx
    return MLPAnswer(of_down.y, dx, by_weights, by_biases[: len(biases)], rows)


def _silu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = 1 / (1 + np.exp(-x))
    return x * s, s * (1 + x * (1 - s))


def _quick_gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    value, slope = _silu(1.702 * x)
    return value / 1.702, slope


def _gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a = np.sqrt(2 / np.pi)
    t = np.tanh(a * (x + 0.044715 * x**3))
    return x * (1 + t) / 2, (1 + t) / 2 + x * (1 - t**2) / 2 * a * (1 + 3 * 0.044715 * x**2)


def _gelu_exact(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    phi = (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2
    return x * phi, phi + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


def _relu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.maximum(x, 0), 1.0 * (x > 0)


def _relu2(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    value, slope = _relu(x)
    return value**2, 2 * value * slope


ACTIVATIONS = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_exact": _gelu_exact,
    "quick_gelu": _quick_gelu,
    "relu": _relu,
    "relu2": _relu2,
}
