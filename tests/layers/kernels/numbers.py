"""Compute attention and its gradients in NumPy float64, one sequence and one head at a time.

Shares no code with the package. Gradients are those of `sum(out * probe)`, derived by hand and
compared with differences in `test_attend.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from tests.layers.oracle import sees


class Problem(NamedTuple):
    """Hold the arrays of one call, in float64, and its keys (see `tests.layers.oracle.sees`)."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    sink: np.ndarray | None
    probe: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    key_positions: np.ndarray
    key_segment_ids: np.ndarray
    scale: float
    cap: float
    span: str
    keys: dict[str, int]


class Gradients(NamedTuple):
    """Hold the gradients of a problem's arrays."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    sink: np.ndarray | None


def solve(problem: Problem) -> tuple[np.ndarray, Gradients]:
    """Return the output and the gradients."""
    p = problem
    rows, tokens, heads, _ = p.query.shape
    group = heads // p.key.shape[2]
    out = np.zeros((rows, tokens, heads, p.value.shape[-1]))
    grads = [np.zeros_like(each) for each in (p.query, p.key, p.value)]
    d_sink = np.zeros(heads)
    for b in range(rows):
        seen = np.array(
            [
                [sees((int(i), int(s)), (int(j), int(t)), p.keys, p.span) for j, t in _pairs(p, b)]
                for i, s in zip(p.positions[b], p.segment_ids[b], strict=True)
            ]
        )
        for n in range(heads):
            q, k, v = p.query[b, :, n], p.key[b, :, n // group], p.value[b, :, n // group]
            plain = p.scale * q @ k.T
            scores = p.cap * np.tanh(plain / p.cap) if p.cap else plain
            exp = np.where(seen, np.exp(scores), 0.0)
            nothing = 0.0 if p.sink is None else math.exp(p.sink[n])
            total = exp.sum(axis=1, keepdims=True) + nothing
            weights = exp / total
            out[b, :, n] = weights @ v
            d_out = p.probe[b, :, n]
            d_weights = d_out @ v.T
            mean = (weights * d_weights).sum(axis=1, keepdims=True)
            d_plain = weights * (d_weights - mean)
            if p.cap:
                d_plain = d_plain / np.cosh(plain / p.cap) ** 2
            grads[0][b, :, n] = p.scale * d_plain @ k
            grads[1][b, :, n // group] += p.scale * d_plain.T @ q
            grads[2][b, :, n // group] += weights.T @ d_out
            d_sink[n] -= (nothing / total * mean).sum()
    query, key, value = grads
    return out, Gradients(query, key, value, None if p.sink is None else d_sink)


def _pairs(p: Problem, b: int) -> Any:
    return zip(p.key_positions[b], p.key_segment_ids[b], strict=True)


def documents(rows: int, tokens: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return positions and segment ids of packed documents of random lengths."""
    begins = rng.random((rows, tokens)) < 0.08
    begins[:, 0] = True
    place = np.broadcast_to(np.arange(tokens), begins.shape)
    positions = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    return positions.astype(np.int32), np.cumsum(begins, axis=1).astype(np.int32)


def make_problem(
    *,
    rows: int = 2,
    tokens: int = 45,
    queries: int | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 6,
    value_dim: int = 6,
    sink: bool = False,
    cap: float = 0.0,
    span: str = "global",
    window: int = 0,
    one_document: bool = False,
    seed: int = 0,
) -> Problem:
    """Draw a problem.

    Args:
        rows: B.
        tokens: T.
        queries: S, the last of the tokens; by default all.
        heads: N.
        kv_heads: J.
        dim: D.
        value_dim: Dv.
        sink: whether heads have sinks.
        cap: soft cap.
        span: which tokens are seen.
        window: of the span.
        one_document: whether each sequence is one document.
        seed: of the numbers.
    """
    rng = np.random.default_rng(seed)
    first = 0 if queries is None else tokens - queries

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32).astype(np.float64)

    positions, segments = documents(rows, tokens, rng)
    if one_document:
        positions, segments = np.tile(np.arange(tokens, dtype=np.int32), (rows, 1)), positions * 0
    return Problem(
        query=draw(rows, tokens - first, heads, dim),
        key=draw(rows, tokens, kv_heads, dim),
        value=draw(rows, tokens, kv_heads, value_dim),
        sink=draw(heads) if sink else None,
        probe=draw(rows, tokens - first, heads, value_dim),
        positions=positions[:, first:],
        segment_ids=segments[:, first:],
        key_positions=positions,
        key_segment_ids=segments,
        scale=0.4,
        cap=cap,
        span=span,
        keys={"sliding_window_size": window, "chunk_attn_window_size": window},
    )
