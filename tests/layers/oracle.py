"""Compute attention, MLP and logits in NumPy float64, one sequence and one head at a time.

Written from the papers (RoFormer, arXiv 2104.09864; YaRN, 2309.00071; LongRoPE, 2402.13753;
DeepSeek-V2, 2405.04434; GQA, 2305.13245; GLU variants, 2002.05202) and shares no code with the
package. What to compute is read from the YAML keys, parameters go by the package's names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Keys = Mapping[str, Any]
Params = Mapping[str, Any]


def frequency(pair: int, pairs: int, keys: Keys, tokens: int) -> float:
    """Compute the radians per position of one pair."""
    theta, stretch = keys["rope_max_timescale"], keys["rope_factor"]
    original = keys["original_max_position_embeddings"]
    plain = theta ** -(pair / pairs)
    kind = keys["rope_type"]
    if kind == "longrope":
        name = "rope_long_factors" if tokens > original else "rope_short_factors"
        return plain / keys[name][pair]
    if kind == "llama3.1":
        turns = original / (2 * math.pi / plain)
        low, high = keys["rope_low_freq_factor"], keys["rope_high_freq_factor"]
        if turns < low:
            return plain / stretch
        if turns > high:
            return plain
        smooth = (turns - low) / (high - low)
        return (1 - smooth) * plain / stretch + smooth * plain
    if kind == "yarn":
        # The pair, a real number, that turns so often over the original length.
        bound = [
            pairs * math.log(original / (2 * math.pi * keys[name]), theta)
            for name in ("beta_fast", "beta_slow")
        ]
        if keys["rope_truncate"]:
            bound = [math.floor(bound[0]), math.ceil(bound[1])]
        low, high = max(bound[0], 0), min(bound[1], 2 * pairs - 1)
        if pair <= low:
            return plain
        if pair >= high:
            return plain / stretch
        part = (pair - low) / (high - low)
        return plain * (1 - part) + plain / stretch * part
    return plain


def magnitude(keys: Keys) -> float:
    if keys["rope_attention_factor"] > 0:
        return keys["rope_attention_factor"]
    return 0.1 * math.log(keys["rope_factor"]) + 1 if keys["rope_attention_scaling"] else 1.0


def of_span(keys: Keys, span: str) -> Keys:
    """Return the keys as they are for layers with a span, which may have a theta of their own."""
    theta = keys["local_rope_max_timescale"]
    if span != "sliding" or theta < 0:
        return keys
    own = {"rope_type": "default", "partial_rotary_factor": 1.0, "rope_max_timescale": theta}
    return {**keys, **own}


def rotate(x: np.ndarray, positions: np.ndarray, keys: Keys) -> np.ndarray:
    """Rotate one head, [S D], with pairs as complex numbers."""
    turned = int(x.shape[1] * keys["partial_rotary_factor"])
    pairs = turned // 2
    if keys["rope_type"] == "proportional":
        half, y = x.shape[1] // 2, x.copy()
        for pair in range(pairs):
            angle = positions * keys["rope_max_timescale"] ** -(pair / half)
            z = (x[:, pair] + 1j * x[:, pair + half]) * np.exp(1j * angle)
            y[:, pair], y[:, pair + half] = z.real, z.imag
        return y
    y = x.copy()
    for pair in range(pairs):
        at = (2 * pair, 2 * pair + 1) if keys["rope_interleave"] else (pair, pair + pairs)
        angle = positions * frequency(pair, pairs, keys, len(x))
        z = (x[:, at[0]] + 1j * x[:, at[1]]) * np.exp(1j * angle) * magnitude(keys)
        y[:, at[0]], y[:, at[1]] = z.real, z.imag
    return y


def sees(query: tuple[int, int], key: tuple[int, int], keys: Keys, span: str) -> bool:
    """Tell whether one token sees another; each is (position, document)."""
    if query[1] != key[1] or key[0] > query[0]:
        return False
    if span == "sliding":
        return query[0] - key[0] < keys["sliding_window_size"]
    if span == "chunked":
        return (
            query[0] // keys["chunk_attn_window_size"] == key[0] // keys["chunk_attn_window_size"]
        )
    return True


def mask(positions: np.ndarray, segments: np.ndarray, keys: Keys, span: str) -> np.ndarray:
    tokens = [(int(p), int(s)) for p, s in zip(positions, segments, strict=True)]
    return np.array([[sees(q, k, keys, span) for k in tokens] for q in tokens])


def _rms(x: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)


def _softmax(
    query: np.ndarray, key: np.ndarray, seen: np.ndarray, scale: float, keys: Keys, sink: Any
) -> np.ndarray:
    """Compute the attention weights of one head."""
    scores = query @ key.T * scale
    cap = keys["attn_logits_soft_cap"]
    if cap:
        scores = cap * np.tanh(scores / cap)
    shares = np.where(seen, np.exp(scores), 0.0)
    total = shares.sum(axis=1, keepdims=True)
    return shares / (total if sink is None else total + math.exp(sink))


def _head(p: Params, name: str, x: np.ndarray, head: int) -> np.ndarray:
    y = x @ p[name][:, head]
    return y + p[f"{name}_bias"][head] if f"{name}_bias" in p else y


def _gqa_heads(p: Params, name: str, x: np.ndarray, keys: Keys) -> list[np.ndarray]:
    """Compute all heads of queries, keys or values, normalised and clipped, without positions."""
    of = name if name in p else "key"  # values may be keys
    heads = [_head(p, of, x, head) for head in range(p[of].shape[1])]
    epsilon = keys["normalization_layer_epsilon"]
    if keys["use_v_norm"] and name == "value":
        heads = [_rms(h, epsilon) for h in heads]
    if keys["use_qk_norm"] and name != "value":
        kind = keys["qk_norm_type"]
        if kind == "head":
            heads = [_rms(h, epsilon) * p[f"{name}_norm"]["scale"] for h in heads]
        elif kind == "projection":
            scale = p[f"{name}_norm"]["scale"].reshape(-1)
            whole = _rms(np.concatenate(heads, axis=1), epsilon) * scale
            heads = np.split(whole, len(heads), axis=1)
    most = keys["clip_qkv"]
    return [np.clip(h, -most, most) if most > 0 else h for h in heads]


def gqa_row(
    x: np.ndarray, p: Params, positions: np.ndarray, seen: np.ndarray, keys: Keys, rope: bool
) -> np.ndarray:
    query, key, value = (_gqa_heads(p, name, x, keys) for name in ("query", "key", "value"))
    if rope:
        query, key = ([rotate(h, positions, keys) for h in heads] for heads in (query, key))
        if keys["use_qk_norm"] and keys["qk_norm_type"] == "l2":
            epsilon = keys["normalization_layer_epsilon"]
            query, key = ([_rms(h, epsilon) for h in heads] for heads in (query, key))
    elif keys["temperature_tuning"]:
        floor, scale = keys["temperature_tuning_floor"], keys["temperature_tuning_scale"]
        growth = 1 + scale * np.log(1 + np.floor((positions + 1) / floor))
        query = [h * growth[:, None] for h in query]
    scale = keys["attention_scale"]
    scale = query[0].shape[1] ** -0.5 if scale < 0 else scale
    y = np.zeros_like(x)
    for head, each in enumerate(query):
        shared = head // (len(query) // len(key))
        sink = p["sink"][head] if "sink" in p else None
        weights = _softmax(each, key[shared], seen, scale, keys, sink)
        attended = weights @ value[shared]
        if keys["attention_output_gate"]:
            attended = attended / (1 + np.exp(-_head(p, "gate", x, head)))
        y += attended @ p["out"][head]
    return y + p["out_bias"] if "out_bias" in p else y


def mla_row(
    x: np.ndarray, p: Params, positions: np.ndarray, seen: np.ndarray, keys: Keys, rope: bool
) -> np.ndarray:
    nope, rank = keys["qk_nope_head_dim"], keys["kv_lora_rank"]

    def down(name: str) -> np.ndarray:
        y = x @ p[f"{name}_down"]
        return y + p[f"{name}_down_bias"] if f"{name}_down_bias" in p else y

    to_query, source = ("query", x)
    if keys["q_lora_rank"]:
        to_query = "query_up"
        source = _rms(down("query"), keys["latent_norm_epsilon"]) * p["query_norm"]["scale"]
    if keys["use_indexer"] and len(x) > keys["indexer_topk"]:
        seen = chosen(x, source, p["indexer"], positions, seen, keys, rope)
    both = down("latent")
    latent = _rms(both[:, :rank], keys["latent_norm_epsilon"]) * p["latent_norm"]["scale"]
    turned_key = rotate(both[:, rank:], positions, keys) if rope else both[:, rank:]
    size = nope + keys["qk_rope_head_dim"]
    scale = size**-0.5 if keys["attention_scale"] < 0 else keys["attention_scale"]
    if keys["rope_type"] == "yarn":
        scale *= (0.1 * keys["mscale"] * math.log(keys["rope_factor"]) + 1) ** 2
    y = np.zeros_like(x)
    for head in range(p["out"].shape[0]):
        query = source @ p[to_query][:, head]
        if rope:
            query = np.concatenate([query[:, :nope], rotate(query[:, nope:], positions, keys)], 1)
        key_value = latent @ p["latent_up"][:, head]
        key = np.concatenate([key_value[:, :nope], turned_key], axis=1)
        sink = p["sink"][head] if "sink" in p else None
        weights = _softmax(query, key, seen, scale, keys, sink)
        y += weights @ key_value[:, nope:] @ p["out"][head]
    return y + p["out_bias"] if "out_bias" in p else y


def chosen(
    x: np.ndarray,
    latent: np.ndarray,
    p: Params,
    positions: np.ndarray,
    seen: np.ndarray,
    keys: Keys,
    rope: bool,
) -> np.ndarray:
    """Leave of what each token sees what an indexer chooses, token by token."""
    turning = {**keys, "rope_interleave": keys["indexer_rope_interleave"]}
    first = keys["qk_rope_head_dim"]

    def turned(h: np.ndarray) -> np.ndarray:
        return (
            np.concatenate([rotate(h[:, :first], positions, turning), h[:, first:]], 1)
            if rope
            else h
        )

    key = x @ p["key"]
    key = key - key.mean(axis=1, keepdims=True)
    key = turned(_rms(key, 1e-6) * p["key_norm"]["scale"] + p["key_norm"]["bias"])
    weights, scores = x @ p["weight"], np.zeros(seen.shape)
    for head in range(weights.shape[1]):
        products = turned(latent @ p["query"][:, head]) @ key.T
        scores += weights[:, [head]] * np.maximum(products, 0)
    left = np.zeros_like(seen)
    for at, row in enumerate(scores):
        best = sorted((-row[other], other) for other in np.flatnonzero(seen[at]))
        left[at, [other for _, other in best[: keys["indexer_topk"]]]] = True
    return left


def attention(
    x: np.ndarray, p: Params, masks: list[np.ndarray], positions: np.ndarray, keys: Keys, rope: bool
) -> np.ndarray:
    """Compute a layer's attention on [B S M]; `masks` has a `mask` for every sequence."""
    row = mla_row if keys["attention_type"] == "mla" else gqa_row
    return np.stack(
        [row(x[b], p, positions[b], masks[b], keys, rope) for b in range(len(x))],
    )


_erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "silu": lambda u: u / (1 + np.exp(-u)),
    "gelu": lambda u: 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))),
    "gelu_exact": lambda u: 0.5 * u * (1 + _erf(u / math.sqrt(2))),
    "quick_gelu": lambda u: u / (1 + np.exp(-1.702 * u)),
    "relu": lambda u: np.where(u > 0, u, 0.0),
    "relu2": lambda u: np.where(u > 0, u * u, 0.0),
}


def gated(gate: np.ndarray, up: np.ndarray, keys: Keys) -> np.ndarray:
    limit = keys["mlp_activations_limit"]
    if limit > 0:
        gate, up = np.where(gate > limit, limit, gate), np.clip(up, -limit, limit)
    return ACTIVATIONS[keys["mlp_activations"][0]](gate) * (up + keys["mlp_linear_offset"])


def mlp(x: np.ndarray, p: Params, keys: Keys) -> np.ndarray:
    def project(name: str, y: np.ndarray) -> np.ndarray:
        y = y @ p[name]
        return y + p[f"{name}_bias"] if keys["mlp_bias"] else y

    if "gate" not in p:
        return project("down", ACTIVATIONS[keys["mlp_activations"][0]](project("up", x)))
    return project("down", gated(project("gate", x), project("up", x), keys))


def logits(x: np.ndarray, p: Params, keys: Keys) -> np.ndarray:
    y = x @ (p["table"].T if keys["logits_via_embedding"] else p["kernel"])
    if keys["logits_bias"]:
        y = y + p["bias"]
    y = y / keys["logits_scaling"]
    cap = keys["final_logits_soft_cap"]
    return cap * np.tanh(y / cap) if cap else y
