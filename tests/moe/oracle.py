"""Compute a Mixture-of-Experts layer in NumPy float64, one choice at a time, gradients included.

It is written from the papers (GShard, arXiv 2006.16668; Switch, 2101.03961; ST-MoE, 2202.08906;
Mixtral, 2401.04088) and has no code in common with the package, so that the two agree only if both
are right. `test_oracle.py` compares its gradients with finite differences.

Dims: B sequences, S tokens of a sequence, M model, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np

PARAMETERS = ("kernel", "gate", "up", "down")
FURTHER = ("router_bias", "correction", "gate_bias", "up_bias", "down_bias")
"""Parameters that a layer may have besides."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Describe the layer to compute; names are those of the package's configuration."""

    k: int = 2
    capacity_factor: float = 1.0
    capacity_rule: Literal["maxtext", "gshard"] = "maxtext"
    min_capacity: int = 0
    drop_policy: Literal["position", "probability"] = "position"
    renormalise: bool = True
    activation: str = "silu"
    round_robin: bool = False
    load_balance: Literal["maxtext", "sequence", "gshard", "huggingface"] = "maxtext"
    load_balance_weight: float = 0.0
    z_weight: float = 0.0
    score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    scaling: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    on_input: bool = False
    limit: float = math.inf
    offset: float = 0.0


@dataclass
class Answer:
    """Hold the layer's outputs and, per input, the gradient of `total`."""

    y: np.ndarray
    load_balance: np.ndarray
    z_loss: np.ndarray
    counts: np.ndarray
    dropped: np.ndarray
    total: float
    margin: float
    """The least gap, over tokens, between a chosen and a refused expert's probability."""
    grads: dict[str, np.ndarray] = field(default_factory=dict)


def layer_capacity(tokens: int, experts: int, settings: Settings) -> int:
    """Return the number of slots that an expert has for one sequence."""
    factor, k = settings.capacity_factor, settings.k
    if factor <= 0:
        return tokens
    if settings.capacity_rule == "maxtext":
        slots = int(max(math.ceil(tokens * k / experts) * factor, factor))
    else:
        # Exact: in floats, tokens / experts * factor * k may end just above a whole number.
        slots = math.ceil(Fraction(tokens, experts) * Fraction(factor) * k)
    return max(slots, settings.min_capacity)


def top_k(probs: np.ndarray, k: int) -> list[int]:
    """Return the indices of the k largest, largest first; ties go to the lower index."""
    return sorted(range(len(probs)), key=lambda e: (-probs[e], e))[:k]


def seat(
    chosen: list[list[int]], probs: np.ndarray, capacity: int, drop_policy: str
) -> dict[tuple[int, int], int]:
    """Return (token, expert) -> slot for the kept choices of one sequence."""
    slots: dict[tuple[int, int], int] = {}
    for expert in range(probs.shape[1]):
        tokens = [token for token, experts in enumerate(chosen) if expert in experts]
        if drop_policy == "probability":
            tokens.sort(key=lambda token: (-probs[token, expert], token))
        for slot, token in enumerate(sorted(tokens[:capacity])):
            slots[token, expert] = slot
    return slots


def outside_kept_groups(ranked: np.ndarray, settings: Settings) -> list[int]:
    """Return the experts that are in no group that the token may choose from."""
    experts = len(ranked)
    size = experts // settings.groups
    best = [sorted(ranked[g * size : (g + 1) * size])[::-1] for g in range(settings.groups)]
    of_group = np.array([b[0] if settings.group_score == "max" else b[0] + b[1] for b in best])
    kept = top_k(of_group, settings.kept_groups)
    return [e for e in range(experts) if e // size not in kept]


def activation(name: str, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nonlinearity and its derivative."""
    if name == "relu":
        return np.maximum(u, 0.0), (u > 0).astype(u.dtype)
    if name == "silu":
        s = 1.0 / (1.0 + np.exp(-u))
        return u * s, s + u * s * (1.0 - s)
    assert name == "gelu"
    c = math.sqrt(2.0 / math.pi)
    t = np.tanh(c * (u + 0.044715 * u**3))
    return 0.5 * u * (1 + t), 0.5 * (1 + t) + 0.5 * u * (1 - t**2) * c * (1 + 3 * 0.044715 * u**2)


def load_balance_rows(
    probs: np.ndarray, counts: np.ndarray, k: int, convention: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss of each sequence, and the gradient of their mean for `probs`.

    The fraction of choices is a count: it has no gradient.
    """
    rows, tokens, experts = probs.shape
    if convention in {"maxtext", "sequence"}:
        fraction = counts / tokens  # sums to K, or to 1
        fraction = fraction / (k if convention == "sequence" else 1)
        loss = experts * np.sum(probs.mean(axis=1) * fraction, axis=1)
        grad = experts * fraction[:, None, :] / (rows * tokens)
    else:
        fraction = counts.sum(axis=0) / (rows * tokens)
        scale = experts / k if convention == "gshard" else float(experts)
        loss = np.full(rows, scale * np.sum(probs.mean(axis=(0, 1)) * fraction))
        grad = scale * fraction / (rows * tokens)
    return loss, np.broadcast_to(grad, probs.shape)


def moe_layer(
    x: np.ndarray, params: dict[str, np.ndarray], cotangent: np.ndarray, settings: Settings
) -> Answer:
    """Compute the forward and the backward pass.

    The gradients are those of `total = sum(y * cotangent) + load_balance_weight * mean over
    sequences of the load-balance loss + z_weight * mean over sequences of the z-loss`.
    """
    x, cotangent = x.astype(np.float64), cotangent.astype(np.float64)
    kernel, gate, up, down = (params[name].astype(np.float64) for name in PARAMETERS)
    zero = {"router_bias": kernel[0], "correction": kernel[0], "gate_bias": gate[:, 0]}
    zero |= {"up_bias": up[:, 0], "down_bias": down[:, 0]}
    bias = {
        name: params.get(name, np.zeros_like(like)).astype(np.float64)
        for name, like in zero.items()
    }
    dbias = {name: np.zeros_like(array) for name, array in bias.items()}
    rows, tokens, _ = x.shape
    experts, k = kernel.shape[1], settings.k
    capacity = layer_capacity(tokens, experts, settings)

    logits = x @ kernel + bias["router_bias"]
    log_z = np.log(np.sum(np.exp(logits), axis=-1))
    scores = softmax = np.exp(logits - log_z[..., None])
    if settings.score == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    # The probabilities of the load-balance loss: they sum to 1.
    total_score = np.sum(scores, axis=-1, keepdims=True)
    probs = scores / total_score
    y = np.zeros_like(x)
    counts = np.zeros((rows, experts), np.int64)
    dropped = np.zeros(rows, np.int64)
    margin = math.inf
    dx, dscores = np.zeros_like(x), np.zeros_like(probs)
    dgate, dup, ddown = np.zeros_like(gate), np.zeros_like(up), np.zeros_like(down)

    ranked = scores + bias["correction"]
    for row, token in np.ndindex(rows, tokens):
        ranked[row, token, outside_kept_groups(ranked[row, token], settings)] = -np.inf
    for row in range(rows):
        chosen = [
            [(token * k + i) % experts for i in range(k)]
            if settings.round_robin
            else top_k(ranked[row, token], k)
            for token in range(tokens)
        ]
        slots = seat(chosen, probs[row], capacity, settings.drop_policy)
        for token in range(tokens):
            mine = chosen[token]
            p, order = scores[row, token], ranked[row, token]
            refused = np.delete(order, mine)
            if not settings.round_robin:
                gap = order[mine].min() - refused.max() if refused.size else math.inf
                margin = min(margin, gap)
            norm = (p[mine].sum() if settings.renormalise else 1.0) / settings.scaling
            weights = p[mine] / norm
            dweights = np.zeros(k)
            for i, e in enumerate(mine):
                counts[row, e] += 1
                if (token, e) not in slots:
                    dropped[row] += 1
                    continue
                taken, given = (weights[i], 1.0) if settings.on_input else (1.0, weights[i])
                v = taken * x[row, token]
                u, w = v @ gate[e] + bias["gate_bias"][e], v @ up[e] + bias["up_bias"][e]
                act, slope = activation(settings.activation, np.minimum(u, settings.limit))
                lin = np.clip(w, -settings.limit, settings.limit) + settings.offset
                out = (act * lin) @ down[e] + bias["down_bias"][e]
                y[row, token] += given * out
                # Backward of this one choice.
                dout = given * cotangent[row, token]
                ddown[e] += np.outer(act * lin, dout)
                dbias["down_bias"][e] += dout
                dhidden = down[e] @ dout
                du = dhidden * lin * slope * (u < settings.limit)
                dw = dhidden * act * (np.abs(w) < settings.limit)
                dgate[e] += np.outer(v, du)
                dup[e] += np.outer(v, dw)
                dbias["gate_bias"][e] += du
                dbias["up_bias"][e] += dw
                dv = gate[e] @ du + up[e] @ dw
                dx[row, token] += taken * dv
                dweights[i] = (
                    x[row, token] @ dv if settings.on_input else cotangent[row, token] @ out
                )
            dchosen = dweights / norm
            if settings.renormalise:
                dchosen -= (dweights @ weights) / (norm * settings.scaling)
            for i, e in enumerate(mine):
                dscores[row, token, e] += dchosen[i]

    load_balance, dload = load_balance_rows(probs, counts, k, settings.load_balance)
    z_loss = np.mean(log_z**2, axis=1)
    dload = settings.load_balance_weight * dload
    dscores += (dload - np.sum(dload * probs, axis=-1, keepdims=True)) / total_score
    if settings.score == "sigmoid":
        dlogits = dscores * scores * (1 - scores)
    else:
        dlogits = scores * (dscores - np.sum(dscores * scores, axis=-1, keepdims=True))
    dlogits += settings.z_weight * 2 * log_z[..., None] * softmax / (rows * tokens)
    dx += dlogits @ kernel.T
    dkernel = np.einsum("bsm,bse->me", x, dlogits)
    dbias["router_bias"] = np.sum(dlogits, axis=(0, 1))
    total = (
        np.sum(y * cotangent)
        + settings.load_balance_weight * load_balance.mean()
        + settings.z_weight * z_loss.mean()
    )
    return Answer(
        y=y,
        load_balance=load_balance,
        z_loss=z_loss,
        counts=counts,
        dropped=dropped,
        total=float(total),
        margin=float(margin),
        grads={
            **{"x": dx, "kernel": dkernel, "gate": dgate, "up": dup, "down": ddown},
            **{name: grad for name, grad in dbias.items() if name in params},
        },
    )
