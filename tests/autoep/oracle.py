"""Define a decoder's parameters, element by element, from the models' own code.

A matrix of `nn.Linear` is [out, in]; heads follow one another along the rows of queries, keys and
values, and along the columns of the output. Nothing of the package is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def numbered(shapes: dict[str, list[int]]) -> Arrays:
    """Make tensors in which all elements differ, across tensors too."""
    arrays, at = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        arrays[name] = np.arange(at, at + size).reshape(shape)
        at += size
    return arrays


def by_head(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Reshape [out, in] to [in, heads, out of a head]."""
    size = len(matrix) // heads
    return np.stack([matrix[h * size : (h + 1) * size].T for h in range(heads)], axis=1)


def outer(tensors: Arrays, config: dict[str, Any]) -> Arrays:
    """Return the parameters outside the layers."""
    found = {"embedding.table": tensors["model.embed_tokens.weight"]}
    found["final_norm.scale"] = tensors["model.norm.weight"]
    if not config["tie_word_embeddings"]:
        found["embedding.kernel"] = tensors["lm_head.weight"].T
    if "lm_head.bias" in tensors:
        found["embedding.bias"] = tensors["lm_head.bias"]
    if "model.norm.bias" in tensors:
        found["final_norm.bias"] = tensors["model.norm.bias"]
    return found


def layer(tensors: Arrays, config: dict[str, Any], number: int) -> Arrays:
    """Return the parameters of one layer."""
    start = f"model.layers.{number}."
    t = {name.removeprefix(start): a for name, a in tensors.items() if name.startswith(start)}
    found = {
        "attention_norm.scale": t["input_layernorm.weight"],
        "mlp_norm.scale": t["post_attention_layernorm.weight"],
    }
    if "input_layernorm.bias" in t:
        found["attention_norm.bias"] = t["input_layernorm.bias"]
        found["mlp_norm.bias"] = t["post_attention_layernorm.bias"]
    attention = {
        name.removeprefix("self_attn."): a for name, a in t.items() if name.startswith("self_attn.")
    }
    found |= {f"attention.{name}": a for name, a in _attention(attention, config).items()}
    block = next(
        name for name in ("block_sparse_moe", "feed_forward", "mlp") if any(name in n for n in t)
    )
    inner = {
        name.removeprefix(f"{block}."): a for name, a in t.items() if name.startswith(f"{block}.")
    }
    return found | {f"mlp.{name}": a for name, a in _mlp(inner, config).items()}


def _attention(t: Arrays, config: dict[str, Any]) -> Arrays:
    queries, keys = config["num_attention_heads"], config.get("num_key_value_heads")
    keys = queries if keys is None else keys
    out = t["o_proj.weight"]
    size = out.shape[1] // queries
    found = {"out": np.stack([out[:, h * size : (h + 1) * size].T for h in range(queries)])}
    if "o_proj.bias" in t:
        found["out_bias"] = t["o_proj.bias"]
    if "sinks" in t:
        found["sink"] = t["sinks"]
    if "kv_b_proj.weight" in t:
        found["latent_down"] = t["kv_a_proj_with_mqa.weight"].T
        found["latent_norm.scale"] = t["kv_a_layernorm.weight"]
        found["latent_up"] = by_head(t["kv_b_proj.weight"], queries)
        if "kv_a_proj_with_mqa.bias" in t:
            found["latent_down_bias"] = t["kv_a_proj_with_mqa.bias"]
        if "q_proj.weight" in t:
            return found | {"query": by_head(t["q_proj.weight"], queries)}
        found["query_down"] = t["q_a_proj.weight"].T
        found["query_norm.scale"] = t["q_a_layernorm.weight"]
        found["query_up"] = by_head(t["q_b_proj.weight"], queries)
        if "q_a_proj.bias" in t:
            found["query_down_bias"] = t["q_a_proj.bias"]
        return found
    for name, short, heads in (("query", "q", queries), ("key", "k", keys), ("value", "v", keys)):
        found[name] = by_head(t[f"{short}_proj.weight"], heads)
        if f"{short}_proj.bias" in t:
            found[f"{name}_bias"] = np.stack(np.split(t[f"{short}_proj.bias"], heads))
    for name, short, heads in (("query", "q", queries), ("key", "k", keys)):
        scale = t.get(f"{short}_norm.weight")
        if scale is not None:
            of_all_heads = config["model_type"] == "olmoe"
            found[f"{name}_norm.scale"] = (
                np.stack(np.split(scale, heads)) if of_all_heads else scale
            )
    return found


def _mlp(t: Arrays, config: dict[str, Any]) -> Arrays:
    if "gate_proj.weight" in t:
        return {part: t[f"{part}_proj.weight"].T for part in ("gate", "up", "down")}
    router = next(n for n in ("gate", "router", "router.layer") if f"{n}.weight" in t)
    found = {"router.kernel": t[f"{router}.weight"].T}
    if f"{router}.bias" in t:
        found["router.bias"] = t[f"{router}.bias"]
    for name, array in t.items():
        if "correction_bias" in name:
            found["router.correction_bias"] = array.reshape(-1)
        if name == "shared_expert_gate.weight":
            found["shared_gate"] = array[0]
        for part in ("gate", "up", "down"):
            if name.startswith("shared_expert") and name.endswith(f".{part}_proj.weight"):
                found[f"shared.{part}"] = array.T
    return found | {f"experts.{name}": a for name, a in _experts(t, config).items()}


def _experts(t: Arrays, config: dict[str, Any]) -> Arrays:
    kind = config["model_type"]
    both = t.get("experts.gate_up_proj", t.get("input_linear.weight"))
    down = t.get("experts.down_proj", t.get("output_linear.weight"))
    if both is None or down is None:
        names = dict(
            zip(("gate", "up", "down"), ("gate_proj", "up_proj", "down_proj"), strict=True)
        )
        if "experts.0.w1.weight" in t:
            names = {"gate": "w1", "up": "w3", "down": "w2"}
        count = len({name.split(".")[1] for name in t if name.startswith("experts.")})
        return {
            part: np.stack([t[f"experts.{e}.{name}.weight"].T for e in range(count)])
            for part, name in names.items()
        }
    if kind == "gpt_oss":
        bias, of_down = t["experts.gate_up_proj_bias"], t["experts.down_proj_bias"]
        return {
            "gate": both[:, :, 0::2],
            "up": both[:, :, 1::2],
            "down": down,
            "gate_bias": bias[:, 0::2],
            "up_bias": bias[:, 1::2],
            "down_bias": of_down,
        }
    if kind == "llama4_text":
        half = both.shape[2] // 2
        return {"gate": both[:, :, :half], "up": both[:, :, half:], "down": down}
    half = both.shape[1] // 2
    return {
        "gate": both[:, :half].transpose(0, 2, 1),
        "up": both[:, half:].transpose(0, 2, 1),
        "down": down.transpose(0, 2, 1),
    }
