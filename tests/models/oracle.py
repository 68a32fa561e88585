"""Compute the whole decoder in NumPy float64, and again in jax for its gradients.

Both are written from the papers (Llama 2, arXiv 2307.09288; GQA, 2305.13245; RoFormer, 2104.09864;
Mixtral, 2401.04088) and share no code with the package. `forward` goes head by head and takes the
MoE layer from `tests.moe.oracle`; `dense_loss` computes every expert on every token and masks, on
one device, without scan, remat or sharding, so that jax can differentiate it. `test_oracle.py`
holds them against each other.

Parameters are those of the package by name, nested dicts of arrays whose layers are stacked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.moe.oracle import Settings, activation, layer_capacity, moe_layer
from tests.quick import QUICK


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Hold what the parameters' shapes do not show. `moe` is None for a dense model."""

    theta: float
    epsilon: float
    activation: str
    moe: Settings | None
    mtp_weight: float = 0.0
    mtp_after_final_norm: bool = False


class Answer(NamedTuple):
    """Hold the model's outputs for a batch. Statistics have a leading dim of layers, MTP's last."""

    logits: np.ndarray
    ahead: np.ndarray
    """Logits of each MTP layer."""
    load_balance: np.ndarray
    z_loss: np.ndarray
    counts: np.ndarray
    dropped: np.ndarray
    margin: float
    """Least gap, over layers and tokens, between a chosen and a refused expert."""


def _rms_norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def _rotate(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Rotate in Hugging Face's rotate-half form: x * cos + rotate_half(x) * sin."""
    dim = x.shape[-1]
    inverse = 1.0 / theta ** (np.arange(0, dim, 2) / dim)
    angles = np.concatenate([np.outer(positions, inverse)] * 2, axis=-1)
    turned = np.concatenate([-x[:, dim // 2 :], x[:, : dim // 2]], axis=-1)
    return x * np.cos(angles) + turned * np.sin(angles)


def _attention(
    x: np.ndarray,
    p: dict[str, Any],
    positions: np.ndarray,
    segments: np.ndarray,
    architecture: Architecture,
) -> np.ndarray:
    """Attend within one sequence, one query head at a time."""
    heads, kv_heads = p["query"].shape[1], p["key"].shape[1]
    y = np.zeros_like(x)
    for head in range(heads):
        shared = head // (heads // kv_heads)
        query, key = x @ p["query"][:, head], x @ p["key"][:, shared]
        if "query_norm" in p:
            query = _rms_norm(query, p["query_norm"]["scale"], architecture.epsilon)
            key = _rms_norm(key, p["key_norm"]["scale"], architecture.epsilon)
        query = _rotate(query, positions, architecture.theta)
        key = _rotate(key, positions, architecture.theta)
        value = x @ p["value"][:, shared]
        for at in range(len(x)):
            seen = [s for s in range(at + 1) if segments[s] == segments[at]]
            scores = key[seen] @ query[at] / math.sqrt(query.shape[-1])
            weights = np.exp(scores - scores.max())
            y[at] += (weights / weights.sum()) @ value[seen] @ p["out"][head]
    return y


def forward(
    params: dict[str, Any],
    tokens: np.ndarray,
    positions: np.ndarray,
    segments: np.ndarray,
    architecture: Architecture,
) -> Answer:
    """Compute the logits and the MoE layers' statistics."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    epsilon, settings = architecture.epsilon, architecture.moe
    x = params["embedding"]["table"][tokens]
    answers = []

    def layer(x: np.ndarray, p: dict[str, Any]) -> np.ndarray:
        normalised = _rms_norm(x, p["attention_norm"]["scale"], epsilon)
        rows = zip(normalised, positions, segments, strict=True)
        x = x + np.stack(
            [_attention(row, p["attention"], at, of, architecture) for row, at, of in rows]
        )
        normalised = _rms_norm(x, p["mlp_norm"]["scale"], epsilon)
        if settings is None:
            gated, _ = activation(architecture.activation, normalised @ p["mlp"]["gate"])
            return x + (gated * (normalised @ p["mlp"]["up"])) @ p["mlp"]["down"]
        weights = {"kernel": p["mlp"]["router"]["kernel"], **p["mlp"]["experts"]}
        answers.append(moe_layer(normalised, weights, np.zeros_like(x), settings))
        return x + answers[-1].y

    for index in range(params["layers"]["mlp_norm"]["scale"].shape[0]):
        x = layer(x, jax.tree.map(lambda a, i=index: a[i], params["layers"]))
    left, x = x, _rms_norm(x, params["final_norm"]["scale"], epsilon)
    embedding = params["embedding"]
    kernel = embedding["kernel"] if "kernel" in embedding else embedding["table"].T
    further, h = [], x if architecture.mtp_after_final_norm else left
    for depth, there in enumerate(_ahead(segments, _depths(params)), 1):
        p = jax.tree.map(lambda a, i=depth - 1: a[i], params["mtp"])
        e = embedding["table"][np.where(there >= 0, np.take_along_axis(tokens, there, 1), 0)]
        e = _rms_norm(e, p["embedding_norm"]["scale"], epsilon)
        h = _rms_norm(h, p["hidden_norm"]["scale"], epsilon)
        h = layer(np.concatenate([e, h], -1) @ p["projection"].reshape(-1, h.shape[-1]), p)
        further.append(_rms_norm(h, p["prediction_norm"]["scale"], epsilon) @ kernel)

    def of_layers(name: str) -> np.ndarray:
        return np.stack([getattr(a, name) for a in answers]) if answers else np.zeros(0)

    return Answer(
        logits=x @ kernel,
        ahead=np.stack(further) if further else np.zeros(0),
        load_balance=of_layers("load_balance"),
        z_loss=of_layers("z_loss"),
        counts=of_layers("counts"),
        dropped=of_layers("dropped"),
        margin=min((a.margin for a in answers), default=math.inf),
    )


def _depths(params: dict[str, Any]) -> int:
    return len(params["mtp"]["projection"]) if "mtp" in params else 0


def _ahead(segments: np.ndarray, depths: int) -> list[np.ndarray]:
    """Return, for each depth, the place of the token that far ahead; -1: of another document."""
    found = []
    for depth in range(1, depths + 1):
        places = np.full(segments.shape, -1)
        for row, of in enumerate(segments):
            for at in range(len(of) - depth):
                if of[at] == of[at + depth]:
                    places[row, at] = at + depth
        found.append(places)
    return found


def mtp_loss(
    params: dict[str, Any], batch: dict[str, np.ndarray], architecture: Architecture
) -> float:
    """Compute the mean cross entropy over all that the MTP layers predict, one by one."""
    segments = batch["segment_ids"]
    answer = forward(params, batch["inputs"], batch["positions"], segments, architecture)
    losses, places = [], _ahead(segments, len(answer.ahead))
    for logits, there in zip(answer.ahead, places, strict=True):
        for row, at in zip(*np.nonzero(there >= 0), strict=True):
            scores = logits[row, at]
            target = batch["targets"][row, there[row, at]]
            losses.append(np.log(np.sum(np.exp(scores - scores[target]))))
    return float(np.mean(losses))


def _dense_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def _dense_rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotate complex numbers: the pair (i, i + D/2) times exp(i * angle)."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None] * theta ** (-jnp.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def _dense_moe(
    x: jax.Array, p: dict[str, Any], settings: Settings, act: Any
) -> tuple[jax.Array, jax.Array]:
    """Apply every expert to every token, times its weight there; add the auxiliary loss."""
    experts, k = p["router"]["kernel"].shape[1], settings.k
    logits = x @ p["router"]["kernel"]
    probs = jax.nn.softmax(logits)
    order = jnp.argsort(-probs, axis=-1, stable=True)[..., :k]
    chosen = jnp.sum(jax.nn.one_hot(order, experts), axis=-2)
    weights = probs * chosen
    if settings.renormalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    place = jnp.cumsum(chosen, axis=1) - 1  # by position: the first ones of a row are seated
    weights = weights * (place < layer_capacity(x.shape[1], experts, settings))
    hidden = act(jnp.einsum("bsm,emh->bseh", x, p["experts"]["gate"]))
    hidden = hidden * jnp.einsum("bsm,emh->bseh", x, p["experts"]["up"])
    y = jnp.einsum("bseh,ehm,bse->bsm", hidden, p["experts"]["down"], weights)
    fraction = jax.lax.stop_gradient(jnp.mean(chosen, axis=1))
    assert settings.load_balance == "maxtext"
    balance = experts * jnp.mean(jnp.sum(jnp.mean(probs, axis=1) * fraction, axis=-1))
    z_loss = jnp.mean(jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) ** 2)
    return y, settings.load_balance_weight * balance + settings.z_weight * z_loss


def dense_loss(
    params: dict[str, Any], batch: dict[str, Any], architecture: Architecture
) -> tuple[jax.Array, jax.Array]:
    """Compute the training loss of one microbatch [B, S], and the logits."""
    positions, segments = batch["positions"], batch["segment_ids"]
    act = {"silu": lambda u: u / (1 + jnp.exp(-u)), "gelu": jax.nn.gelu, "relu": jax.nn.relu}[
        architecture.activation
    ]
    epsilon = architecture.epsilon
    x = params["embedding"]["table"][batch["inputs"]]
    seen = segments[:, :, None] == segments[:, None, :]
    seen = seen & (jnp.arange(x.shape[1])[:, None] >= jnp.arange(x.shape[1]))
    layers, depths = params["layers"]["mlp_norm"]["scale"].shape[0], _depths(params)
    further = []

    def layer(x: jax.Array, p: dict[str, Any]) -> jax.Array:
        normalised = _dense_norm(x, p["attention_norm"]["scale"], epsilon)
        project = {
            name: jnp.einsum("bsm,mnd->bsnd", normalised, p["attention"][name])
            for name in ("query", "key", "value")
        }
        if "query_norm" in p["attention"]:
            for name in ("query", "key"):
                scale = p["attention"][f"{name}_norm"]["scale"]
                project[name] = _dense_norm(project[name], scale, epsilon)
        query = _dense_rotate(project["query"], positions, architecture.theta)
        group = query.shape[2] // project["key"].shape[2]
        key = _dense_rotate(project["key"], positions, architecture.theta)
        key, value = (jnp.repeat(a, group, axis=2) for a in (key, project["value"]))
        scores = jnp.einsum("bqnd,bknd->bnqk", query, key) / math.sqrt(query.shape[-1])
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
        attended = jnp.einsum("bnqk,bknd->bqnd", weights, value)
        x = x + jnp.einsum("bqnd,ndm->bqm", attended, p["attention"]["out"])
        normalised = _dense_norm(x, p["mlp_norm"]["scale"], epsilon)
        if architecture.moe is None:
            return x + (
                (act(normalised @ p["mlp"]["gate"]) * (normalised @ p["mlp"]["up"]))
                @ (p["mlp"]["down"])
            )
        y, loss = _dense_moe(normalised, p["mlp"], architecture.moe, act)
        further.append(loss / (layers + depths))
        return x + y

    for index in range(layers):
        x = layer(x, jax.tree.map(lambda a, i=index: a[i], params["layers"]))
    h, x = x, _dense_norm(x, params["final_norm"]["scale"], epsilon)
    embedding = params["embedding"]
    kernel = embedding["kernel"] if "kernel" in embedding else embedding["table"].T

    def surprise(x: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = x @ kernel
        log_probs = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
        return logits, -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]

    logits, losses = surprise(x, batch["targets"])
    predicted, count = jnp.zeros(()), 0
    h = x if architecture.mtp_after_final_norm else h
    for depth, there in enumerate(_ahead(np.asarray(segments), depths), 1):
        p = jax.tree.map(lambda a, i=depth - 1: a[i], params["mtp"])
        tokens = jnp.where(there >= 0, jnp.take_along_axis(batch["inputs"], there, 1), 0)
        joined = [
            _dense_norm(embedding["table"][tokens], p["embedding_norm"]["scale"], epsilon),
            _dense_norm(h, p["hidden_norm"]["scale"], epsilon),
        ]
        h = layer(sum(a @ w for a, w in zip(joined, p["projection"], strict=True)), p)
        ahead = jnp.take_along_axis(batch["targets"], there, 1)
        x = _dense_norm(h, p["prediction_norm"]["scale"], epsilon)
        predicted += jnp.sum(surprise(x, ahead)[1] * (there >= 0))
        count += int(np.sum(there >= 0))
    ahead_loss = architecture.mtp_weight * predicted / max(count, 1)
    return sum(further, jnp.mean(losses)) + ahead_loss, logits


def dense_grads(
    params: dict[str, Any], batch: dict[str, Any], architecture: Architecture
) -> tuple[float, dict[str, Any]]:
    """Compute `dense_loss` and its gradients, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        fields = {name: np.asarray(a) for name, a in batch.items()}
        grad_fn = jax.jit(
            jax.value_and_grad(lambda p: dense_loss(p, fields, architecture)[0]),
            compiler_options=QUICK,
        )
        loss, grads = grad_fn(wide)
        return float(loss), jax.tree.map(np.asarray, grads)
